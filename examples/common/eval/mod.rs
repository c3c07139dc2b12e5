pub mod features;
pub mod watch;
pub use features::raw_pixels;
pub use watch::*;
