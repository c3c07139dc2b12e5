//! Means over seeds with 95 % intervals, paired tests and their correction.

use statrs::distribution::{ContinuousCDF, StudentsT};

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
        let mut this = Self { mean, half_width: None, values: values.to_vec() };
        this.half_width = this.error().and_then(|error| Some(quantile(0.975, n - 1)? * error));
        Some(this)
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

    /// The standard error of the mean; `None` for one value.
    fn error(&self) -> Option<f64> {
        let n = self.values.len();
        let squares: f64 = self.values.iter().map(|v| (v - self.mean).powi(2)).sum();
        (n > 1).then(|| (squares / (n - 1) as f64 / n as f64).sqrt())
    }

    /// The two-sided p value of the t test that the mean is zero: of differences, of the paired t test. `None` for one value.
    pub fn p_value(&self) -> Option<f64> {
        let error = self.error()?;
        if error == 0.0 {
            return Some(if self.mean == 0.0 { 1.0 } else { 0.0 });
        }
        let t = student(self.values.len() - 1)?;
        Some((2.0 * t.cdf(-(self.mean / error).abs())).min(1.0))
    }

    /// Both ends of the interval; `None` for one value.
    pub fn interval(&self) -> Option<(f64, f64)> {
        self.half_width.map(|h| (self.mean - h, self.mean + h))
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

/// Student's distribution with so many degrees of freedom; `None` without any.
fn student(degrees: usize) -> Option<StudentsT> {
    StudentsT::new(0.0, 1.0, degrees as f64).ok()
}

/// Student's t at `p`.
pub fn quantile(p: f64, degrees: usize) -> Option<f64> {
    Some(student(degrees)?.inverse_cdf(p))
}

/// Holm's correction: of `m` p values the k-th smallest, counted from 0, times `m − k`, and never below an earlier one.
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[a].total_cmp(&p[b]));
    let mut adjusted = vec![0.0; p.len()];
    let mut least = 0f64;
    for (rank, i) in order.into_iter().enumerate() {
        least = least.max(p[i] * (p.len() - rank) as f64).min(1.0);
        adjusted[i] = least;
    }
    adjusted
}

/// Whether a difference, for which more is better, shows that nothing is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The whole interval lies above −margin.
    NonInferior,
    /// The whole interval lies below −margin.
    Worse,
    NotShown,
}

impl Verdict {
    /// Of a paired difference.
    pub fn of(difference: &Mean, margin: f64) -> Self {
        match difference.interval() {
            Some((low, _)) if low > -margin => Self::NonInferior,
            Some((_, high)) if high < -margin => Self::Worse,
            _ => Self::NotShown,
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::NonInferior => "not inferior",
            Self::Worse => "worse",
            Self::NotShown => "not shown",
        }
    }
}
