//! Means over seeds with 95 % intervals.

/// Student's t at 97.5 %, for 1 to 30 degrees of freedom.
const T: [f64; 30] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
];

/// A mean, and half the width of its 95 % interval; `None` for one value, which says nothing of the spread.
#[derive(Clone, Debug, PartialEq)]
pub struct Mean {
    pub mean: f64,
    pub half_width: Option<f64>,
    pub values: Vec<f64>,
}

impl Mean {
    /// Of independent values; `None` without any.
    pub fn of(values: &[f64]) -> Option<Self> {
        let n = values.len();
        if n == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let half_width = (n > 1).then(|| {
            let squares: f64 = values.iter().map(|v| (v - mean) * (v - mean)).sum();
            let error = (squares / (n - 1) as f64 / n as f64).sqrt();
            // Beyond the table the normal quantile is close enough.
            T.get(n - 2).copied().unwrap_or(1.96) * error
        });
        Some(Self { mean, half_width, values: values.to_vec() })
    }

    /// Of the differences `a − b` between values of one seed.
    pub fn of_differences(a: &[(u64, f64)], b: &[(u64, f64)]) -> Option<Self> {
        let differences: Vec<f64> = a
            .iter()
            .filter_map(|(seed, x)| {
                let (_, y) = b.iter().find(|(other, _)| other == seed)?;
                Some(x - y)
            })
            .collect();
        Self::of(&differences)
    }

    /// Whether the whole interval lies above zero, or below it: 1 or −1; otherwise 0.
    pub fn sign(&self) -> i32 {
        match self.half_width {
            Some(h) if self.mean > h => 1,
            Some(h) if self.mean < -h => -1,
            _ => 0,
        }
    }

    /// `75.3 ± 0.4`, or the mean alone.
    pub fn show(&self, digits: usize) -> String {
        match self.half_width {
            Some(h) => format!("{:.digits$} ± {h:.digits$}", self.mean),
            None => format!("{:.digits$}", self.mean),
        }
    }

    /// The same with a sign, for differences.
    pub fn show_signed(&self, digits: usize) -> String {
        match self.half_width {
            Some(h) => format!("{:+.digits$} ± {h:.digits$}", self.mean),
            None => format!("{:+.digits$}", self.mean),
        }
    }
}
