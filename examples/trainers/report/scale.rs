//! Ranges, ticks and numbers of an axis.

/// Values beyond this are as good as infinite: no axis can show them beside others.
const LARGEST: f64 = 1e30;

/// Whether a plot can show the value.
pub fn is_drawable(value: f64) -> bool {
    value.is_finite() && value.abs() <= LARGEST
}

/// The least and the largest drawable value.
pub fn extent(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.filter(|v| is_drawable(*v)).fold(None, |range, v| match range {
        None => Some((v, v)),
        Some((low, high)) => Some((f64::min(low, v), f64::max(high, v))),
    })
}

/// The range with some air at both ends; a single value gets air around it, and zero stands at the
/// foot of its axis.
pub fn padded((low, high): (f64, f64)) -> (f64, f64) {
    let span = high - low;
    let size = low.abs().max(high.abs());
    if size == 0.0 {
        return (-0.05, 1.0);
    }
    let air = 0.05 * if span > 1e-9 * size { span } else { size };
    (low - air, high + air)
}

/// An axis from `low` to `high` with ticks at round numbers.
#[derive(Clone)]
pub struct Scale {
    pub low: f64,
    pub high: f64,
    pub ticks: Vec<f64>,
    step: f64,
}

impl Scale {
    /// About `count` ticks, a third more or half of them where no round step is nearer; at whole numbers only if `whole`.
    pub fn new((low, high): (f64, f64), count: usize, whole: bool) -> Self {
        let rough = (high - low) / count as f64;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .map(|m| m * power)
            .into_iter()
            .find(|step| *step >= 0.75 * rough)
            .unwrap_or(10.0 * power);
        let step = if whole { step.max(1.0) } else { step };
        let (first, last) = ((low / step).ceil() as i64, (high / step).floor() as i64);
        Self { low, high, ticks: (first..=last).map(|i| i as f64 * step).collect(), step }
    }

    /// The number at a tick: as many digits as tell it from its neighbors.
    pub fn label(&self, value: f64) -> String {
        let size = self.low.abs().max(self.high.abs());
        let decimals = |step: f64| (-step.log10() - 1e-9).ceil().clamp(0.0, 9.0) as usize;
        // Zero comes out of a product with a sign, or not quite, now and then.
        if value.abs() < 1e-6 * self.step {
            return format!("{:.*}", if tiny(size) { 0 } else { decimals(self.step) }, 0.0);
        }
        if tiny(size) || size >= 1e7 {
            // One exponent for all ticks.
            let power = size.log10().floor();
            let unit = 10f64.powf(power);
            return format!("{:.*}e{power}", decimals(self.step / unit), value / unit);
        }
        grouped(&format!("{value:.*}", decimals(self.step)))
    }
}

/// Whether an axis up to here counts in powers of ten.
fn tiny(size: f64) -> bool {
    size < 1e-3
}

/// Thousands apart: `12,500`.
pub fn grouped(number: &str) -> String {
    let whole = number.find('.').unwrap_or(number.len());
    let start = usize::from(number.starts_with('-'));
    let mut out = String::with_capacity(number.len() + 4);
    for (i, c) in number.chars().enumerate() {
        if i > start && i < whole && (whole - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}
