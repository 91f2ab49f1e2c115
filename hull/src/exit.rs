//! Exit codes of `hull run`.

use std::sync::atomic::{AtomicBool, Ordering};

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

    /// The code of a process that a signal ended: 128 and its number, as shells have it, or
    /// Firecracker's.
    pub fn signal(number: i32) -> Code {
        let codes = if Code::speaks_firecracker() { &FIRECRACKER[..] } else { &[] };
        let known = codes.iter().find(|(known, _)| *known == number).map(|(_, code)| *code);
        let usual = || u8::try_from(number).map_or(u8::MAX, |number| number.saturating_add(128));
        Code(known.unwrap_or_else(usual))
    }

    /// True from [`Code::speak_firecracker`] on.
    pub fn speaks_firecracker() -> bool {
        SPEAKS_FIRECRACKER.load(Ordering::Relaxed)
    }

    /// From now on signals have the codes that Firecracker's clients know.
    pub fn speak_firecracker() {
        SPEAKS_FIRECRACKER.store(true, Ordering::Relaxed);
    }
}

/// Which program this process is to its caller.
static SPEAKS_FIRECRACKER: AtomicBool = AtomicBool::new(false);

/// Firecracker's codes of signals (`FcExitCode` of its documentation). SIGPIPE is
/// ignored; SIGXFSZ is held back, so that a file which may not grow is an error of its request.
const FIRECRACKER: [(i32, u8); 5] = [
    (libc::SIGBUS, 149),
    (libc::SIGSEGV, 150),
    (libc::SIGXCPU, 154),
    (libc::SIGHUP, 156),
    (libc::SIGILL, 157),
];

impl From<&Ending> for Code {
    fn from(ending: &Ending) -> Code {
        match ending {
            Ending::PowerOff | Ending::Reset | Ending::Quit => Code::SUCCESS,
            // For Firecracker, a guest that crashed is a guest that is at its end.
            Ending::TripleFault if Code::speaks_firecracker() => Code::SUCCESS,
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
        assert_eq!(Code::signal(libc::SIGHUP), Code(129));
        Code::speak_firecracker();
        assert_eq!(Code::signal(libc::SIGHUP), Code(156));
        assert_eq!(Code::from(&Ending::TripleFault), Code::SUCCESS);
    }
}
