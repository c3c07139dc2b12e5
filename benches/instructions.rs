//! Two fixed workloads whose instructions can be counted: a baseline without noise.
//!
//! ```text
//! cargo bench --bench instructions --no-run       # prints the program
//! RAYON_NUM_THREADS=1 valgrind --tool=callgrind PROGRAM contrast
//! RAYON_NUM_THREADS=1 valgrind --tool=callgrind PROGRAM action
//! ```
#![allow(missing_docs)] // of a program

mod workload;

use candle_core::Var;
use ser_reg::Filter;
use workload::{action, contrast::Pair, random, resize};

fn main() {
    match std::env::args().nth(1).as_deref() {
        // NT-Xent of 4 images, 49 tokens, 64 channels: one direction, then both, with gradients.
        Some("contrast") => {
            let pair = Pair::new((4, 49, 64));
            println!("{} {}", pair.ours(false), pair.ours(true));
        }
        // Turns of 64 token maps 14×14×64 and back, and a bicubic 14×14 to 12×16 with its gradient.
        Some("action") => {
            let tokens = random(&[action::BATCH, 196, 64], 0);
            let turn = action::operator(14);
            let back = turn.adjoint().apply(&turn.apply(&tokens).unwrap()).unwrap();
            assert_eq!(workload::gap(&back, &tokens), 0.0);
            let tokens = Var::from_tensor(&tokens).unwrap();
            let resize = resize::operator(Filter::Bicubic);
            let grad = resize::forward_backward(&tokens, |x| Ok(resize.apply(x)?));
            println!("{:?}", grad.dims());
        }
        _ => println!("instructions contrast | action"),
    }
}
