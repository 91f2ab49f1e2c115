//! Giving up the kernel file that the guest maps, when somebody wants to write it.

use super::super::lifecycle::State;
use super::Control;
use super::change::Then;

impl Control {
    /// Gives the kernel file up if somebody wants to write it: now if the machine is paused, else
    /// in a short pause of its own. A pause under way comes by here when it is done.
    pub(super) fn release_kernel_file_if_wanted(&mut self) {
        match self.state {
            _ if !self.kernel_file_wanted || self.change.is_some() || self.frozen => {}
            State::Running => self.pause(Then::ReleaseKernelFile),
            State::Paused => self.release_kernel_file(),
            State::Configured | State::Stopped | State::Failed(_) => {}
        }
    }

    /// Copies what the guest maps of its kernel file, then lets the writer have it.
    pub(super) fn release_kernel_file(&mut self) {
        self.kernel_file_wanted = false;
        let Some((lease, ranges)) = self.machine.leased.take() else { return };
        for (gpa, len) in ranges {
            if let Err(err) = self.machine.ram.detach_file(gpa, len) {
                tracing::error!(%err, "the kernel file changes while the guest maps it");
            }
        }
        drop(lease);
    }
}
