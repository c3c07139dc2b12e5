//! Values that change over training: learning rate, momentum, λ, the ratio of the equivariant part.

use std::f64::consts::PI;

use crate::{Error, Result};

/// A pure function of the step: nothing, then a linear warm-up, then a course from one value to another.
///
/// ```
/// use ser_reg::schedule::Schedule;
/// // learning rate: 100 steps of warm-up, then cosine to zero at step 1000
/// let lr = Schedule::cosine(2e-3, 0.0, 900)?.warm_up(100);
/// assert_eq!((lr.at(0), lr.at(50), lr.at(100)), (0.0, 1e-3, 2e-3));
/// assert!(lr.at(1000) < 1e-12);
/// // momentum of the key encoder: 1 − ½(1 − m₀)(1 + cos πt/T)
/// let momentum = Schedule::cosine(0.99, 1.0, 1000)?;
/// assert!((momentum.at(500) - 0.995).abs() < 1e-12);
/// // λ off for 200 steps, then risen over 100, then constant
/// let lambda = Schedule::constant(1.0)?.warm_up(100).delay(200);
/// assert_eq!((lambda.at(199), lambda.at(250), lambda.at(5000)), (0.0, 0.5, 1.0));
/// # Ok::<(), ser_reg::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    delay: usize,
    warm_up: usize,
    /// Steps from zero to the first value: `warm_up`, or one less.
    rise: usize,
    course: Course,
    from: f64,
    to: f64,
    steps: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Course {
    Linear,
    Cosine,
}

impl Schedule {
    fn new(course: Course, from: f64, to: f64, steps: usize) -> Result<Self> {
        for value in [from, to] {
            if !value.is_finite() {
                return Err(Error::config("Schedule", "finite values", value));
            }
        }
        if steps == 0 {
            return Err(Error::config("Schedule", "at least one step", steps));
        }
        Ok(Self { delay: 0, warm_up: 0, rise: 0, course, from, to, steps })
    }

    /// The same value at every step.
    ///
    /// # Errors
    /// If the value is not finite.
    pub fn constant(value: f64) -> Result<Self> {
        Self::new(Course::Linear, value, value, 1)
    }

    /// `from + (to − from)·t/steps`, then `to`.
    ///
    /// # Errors
    /// If a value is not finite or `steps` is zero.
    pub fn linear(from: f64, to: f64, steps: usize) -> Result<Self> {
        Self::new(Course::Linear, from, to, steps)
    }

    /// `to + ½(from − to)(1 + cos(π·t/steps))`, then `to`.
    ///
    /// # Errors
    /// If a value is not finite or `steps` is zero.
    pub fn cosine(from: f64, to: f64, steps: usize) -> Result<Self> {
        Self::new(Course::Cosine, from, to, steps)
    }

    /// A linear rise from zero to the first value over `steps` before the course begins.
    pub fn warm_up(mut self, steps: usize) -> Self {
        self.warm_up = steps;
        self.rise = steps;
        self
    }

    /// As [`warm_up`](Self::warm_up), but the last of the `steps` has the first value already, and the course begins with
    /// it once more: `numpy.linspace(0, value, steps)`, as the official DINO code has it.
    ///
    /// ```
    /// # use ser_reg::schedule::Schedule;
    /// let lr = Schedule::cosine(1e-3, 0.0, 100)?.warm_up_inclusive(11);
    /// assert_eq!((lr.at(0), lr.at(5), lr.at(10), lr.at(11)), (0.0, 5e-4, 1e-3, 1e-3));
    /// // a single step is the first point of the line: zero
    /// assert_eq!(Schedule::constant(1.0)?.warm_up_inclusive(1).at(0), 0.0);
    /// # Ok::<(), ser_reg::Error>(())
    /// ```
    pub fn warm_up_inclusive(mut self, steps: usize) -> Self {
        self.warm_up = steps;
        // Never divide by zero: one step is step 0, and zero.
        self.rise = steps.saturating_sub(1).max(1);
        self
    }

    /// Zero for `steps` before everything else.
    pub fn delay(mut self, steps: usize) -> Self {
        self.delay = steps;
        self
    }

    /// The value at `step`, counted from 0.
    pub fn at(&self, step: usize) -> f64 {
        let Some(step) = step.checked_sub(self.delay) else {
            return 0.0;
        };
        if step < self.warm_up {
            return self.from * step as f64 / self.rise as f64;
        }
        let t = ((step - self.warm_up) as f64 / self.steps as f64).min(1.0);
        match self.course {
            _ if t == 1.0 => self.to,
            Course::Linear => self.from + (self.to - self.from) * t,
            Course::Cosine => self.to + 0.5 * (self.from - self.to) * (1.0 + (PI * t).cos()),
        }
    }
}
