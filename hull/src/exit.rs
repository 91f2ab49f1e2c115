//! Exit codes of `hull run`.

use vmm::machine::Ending;

/// What the process ends with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Code(u8);

impl Code {
    /// Guest poweroff, guest reset, or the user ended the machine.
    pub const SUCCESS: Code = Code(0);
    /// The monitor, or the host under it, failed.
    pub const FAILURE: Code = Code(1);
    /// The options or the configuration are not valid.
    pub const USAGE: Code = Code(2);
    /// The guest crashed by a triple fault.
    pub const TRIPLE_FAULT: Code = Code(3);
    /// Firecracker's, of a configuration file that is not valid.
    pub const CONFIGURATION: Code = Code(152);
    /// Firecracker's, of options that are not valid.
    pub const ARGUMENTS: Code = Code(153);

    /// The code of a process that a signal asked to end: 128 and its number, as shells have it.
    fn signal(number: i32) -> Code {
        Code(u8::try_from(number).map_or(u8::MAX, |number| number.saturating_add(128)))
    }
}

impl From<&Ending> for Code {
    fn from(ending: &Ending) -> Code {
        match ending {
            Ending::PowerOff | Ending::Reset | Ending::Quit => Code::SUCCESS,
            Ending::TripleFault => Code::TRIPLE_FAULT,
            Ending::Signal(number) => Code::signal(*number),
        }
    }
}

impl From<Code> for i32 {
    fn from(code: Code) -> i32 {
        i32::from(code.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_codes_of_their_own() {
        assert_eq!(Code::from(&Ending::Signal(libc::SIGINT)), Code(130));
        assert_eq!(Code::from(&Ending::Signal(libc::SIGTERM)), Code(143));
        assert_eq!(Code::from(&Ending::PowerOff), Code::SUCCESS);
        assert_eq!(Code::from(&Ending::TripleFault), Code(3));
    }
}
