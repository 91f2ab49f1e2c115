//! The paravirtual panic device (QEMU, docs/specs/pvpanic.rst): a port by which a guest's kernel says
//! that it panicked.

/// The kernel panicked, and will halt or reset.
const PANICKED: u8 = 1 << 0;
/// The kernel panicked, and a crash kernel takes over.
const CRASH_LOADED: u8 = 1 << 1;

/// Bytes of ports that it has.
pub const LEN: u64 = 1;

/// What the guest can say, which it reads before it says anything.
pub const EVENTS: u8 = PANICKED | CRASH_LOADED;

/// Whether what the guest wrote says that it panicked.
pub fn says_panicked(data: &[u8]) -> bool {
    data.first().is_some_and(|events| events & EVENTS != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_panic_is_one() {
        for (data, panicked) in [
            (&[1][..], true),
            (&[2], true),
            (&[3], true),
            (&[0], false),
            (&[4], false),
            (&[], false),
        ] {
            assert_eq!(says_panicked(data), panicked, "{data:?}");
        }
    }
}
