//! The storages of candle's CPU backend whose values the crate moves without arithmetic.

use candle_core::{CpuStorage, DType, Layout, Result, bail};

/// A move of values that is the same for every type.
pub(crate) trait Moves {
    /// Moves the values of a contiguous tensor.
    fn moved<T: Copy + Default + Send + Sync>(&self, x: &[T]) -> Vec<T>;
}

/// The values of a contiguous CPU tensor as `(start, end)` of its storage.
pub(crate) fn contiguous(op: &str, layout: &Layout) -> Result<(usize, usize)> {
    match layout.contiguous_offsets() {
        Some(range) => Ok(range),
        None => bail!("{op}: expected a contiguous tensor, got {layout:?}"),
    }
}

macro_rules! movable {
    ($($variant:ident)*) => {
        /// Whether [`map`] moves values of this type.
        pub(crate) fn is_movable(dtype: DType) -> bool {
            matches!(dtype, $(DType::$variant)|*)
        }

        /// The storage that `moves` makes of a contiguous tensor of any movable type.
        pub(crate) fn map(
            op: &str,
            storage: &CpuStorage,
            layout: &Layout,
            moves: &impl Moves,
        ) -> Result<CpuStorage> {
            let (start, end) = contiguous(op, layout)?;
            Ok(match storage {
                $(CpuStorage::$variant(x) => CpuStorage::$variant(moves.moved(&x[start..end])),)*
                _ => bail!("{op}: expected integers, or floats of at least 16 bits"),
            })
        }
    };
}

movable!(U8 U32 I16 I32 I64 BF16 F16 F32 F64);
