//! States of a machine and what leads from one to the other.
//!
//! ```text
//!                    start            pause
//!   Configured ───────────> Running <───────> Paused
//!                             │      resume     │
//!              poweroff, reset│quit             │quit
//!                             v                 │
//!                          Stopped <────────────┘
//!                             ^
//!   any of the above ──> Failed(reason)
//! ```
//!
//! Pausing and resuming take time; in between the state is still the old one, with a change under
//! way, and a second change is refused.

use std::fmt;

/// State of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// Assembled; no vCPU has run.
    Configured,
    /// vCPUs run.
    Running,
    /// vCPUs are parked, queues stopped, nothing is in flight.
    Paused,
    /// Over, by the guest's or the user's will.
    Stopped,
    /// Over, because of an error.
    Failed(String),
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Configured => "configured",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopped => "stopped",
            State::Failed(_) => "failed",
        })
    }
}

/// A step that somebody asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Let the vCPUs run for the first time.
    Start,
    /// Halt everything.
    Pause,
    /// Halt everything, if it is not halted already.
    Freeze,
    /// Go on.
    Resume,
    /// Press the power button.
    PowerButton,
    /// Press Ctrl, Alt and Del.
    CtrlAltDel,
}

impl Step {
    fn name(self) -> &'static str {
        match self {
            Step::Start => "start",
            Step::Pause => "pause",
            Step::Freeze => "freeze",
            Step::Resume => "resume",
            Step::PowerButton => "power-button",
            Step::CtrlAltDel => "ctrl-alt-del",
        }
    }

    /// States in which the step is allowed.
    fn allowed_in(self) -> &'static [State] {
        match self {
            Step::Start => &[State::Configured],
            Step::Pause => &[State::Running],
            Step::Freeze => &[State::Running, State::Paused],
            // What is pressed while nothing runs is found afterwards.
            Step::PowerButton | Step::CtrlAltDel => &[State::Running, State::Paused],
            Step::Resume => &[State::Paused],
        }
    }
}

/// A step that is not allowed now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The machine is in the wrong state for it.
    #[error("{step} is not possible while the machine is {state}; {hint}")]
    State {
        /// The step.
        step: &'static str,
        /// The state it is in.
        state: State,
        /// What is possible.
        hint: &'static str,
    },
    /// A change of state is under way.
    #[error("{step} is not possible while the machine is about to {under_way}")]
    Busy {
        /// The step.
        step: &'static str,
        /// The change under way.
        under_way: &'static str,
    },
    /// The guest has no keyboard, or does not listen to it.
    #[error("the guest has no keyboard that it listens to")]
    NoKeyboard,
    /// The machine has no device of this name.
    #[error("there is no device {0}")]
    NoDevice(String),
    /// KVM does not say how the machine stands.
    #[error("the state of the machine cannot be read: {0}")]
    Unreadable(String),
    /// A device keeps what it has.
    #[error("{device}: {reason}")]
    Device {
        /// Its name.
        device: String,
        /// Why.
        reason: String,
    },
    /// The machine ended before it got that far.
    #[error("the machine stopped before {0} was done")]
    Gone(&'static str),
}

/// Checks `step` against `state`.
///
/// # Errors
/// [`Refusal::State`] names the state and what is possible in it.
pub fn check(state: &State, step: Step) -> Result<(), Refusal> {
    if step.allowed_in().contains(state) {
        return Ok(());
    }
    let hint = match state {
        State::Configured => "start it first",
        State::Running => "pause and power-button are possible",
        State::Paused => "resume and power-button are possible",
        State::Stopped | State::Failed(_) => "it is over",
    };
    Err(Refusal::State { step: step.name(), state: state.clone(), hint })
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest powered off.
    PowerOff,
    /// The guest reset itself.
    Reset,
    /// The guest crashed beyond its own handling.
    TripleFault,
    /// A signal asked for it, with its number.
    Signal(i32),
    /// The user asked for it, by escape sequence or command.
    Quit,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_has_its_states_and_a_refusal_names_them() {
        let states = [
            State::Configured,
            State::Running,
            State::Paused,
            State::Stopped,
            State::Failed("x".into()),
        ];
        let steps = [Step::Start, Step::Pause, Step::Resume, Step::PowerButton];
        let allowed: Vec<(String, &str)> = steps
            .iter()
            .flat_map(|&step| {
                states
                    .iter()
                    .filter(move |state| check(state, step).is_ok())
                    .map(move |state| (state.to_string(), step.name()))
            })
            .collect();
        let expected = [
            ("configured", "start"),
            ("running", "pause"),
            ("paused", "resume"),
            ("running", "power-button"),
            ("paused", "power-button"),
        ];
        assert_eq!(allowed, expected.map(|(state, step)| (state.to_owned(), step)));
        let refusal = check(&State::Paused, Step::Pause).unwrap_err().to_string();
        assert_eq!(
            refusal,
            "pause is not possible while the machine is paused; resume and power-button are possible"
        );
    }
}
