//! Systems that take turns: one sample of each, then the next of each.

use crate::Result;
use crate::host::undisturbed;
use crate::report::Report;
use crate::system::System;

/// Who takes turns, and how often.
#[derive(Clone, Copy)]
pub struct Turns<'a> {
    pub systems: &'a [System],
    /// Samples of each that count. One more goes before them, and warms the caches.
    pub runs: usize,
}

impl Turns<'_> {
    /// Has `sample` take samples of each system, which it is told with its place among them. A sample
    /// has a value for each of `benches`, which are names and units.
    pub fn take<const N: usize>(
        self,
        report: &mut Report,
        benches: [(&str, &str); N],
        mut sample: impl FnMut(usize, System) -> Result<[f64; N]>,
    ) -> Result<()> {
        let name = benches.first().map_or("", |(name, _)| name);
        eprintln!("{name}: {} runs each", self.runs);
        let mut seen = vec![[const { Vec::new() }; N]; self.systems.len()];
        for run in 0..=self.runs {
            for (place, system) in self.systems.iter().enumerate() {
                let values = undisturbed(|| sample(place, *system))
                    .map_err(|error| format!("{name}, {}: {error}", system.name()))?;
                if run > 0 {
                    seen[place].iter_mut().zip(values).for_each(|(all, value)| all.push(value));
                }
            }
        }
        for (index, (bench, unit)) in benches.into_iter().enumerate() {
            for (system, values) in self.systems.iter().zip(&mut seen) {
                report.add(bench, system.name(), unit, std::mem::take(&mut values[index]));
            }
        }
        Ok(())
    }
}
