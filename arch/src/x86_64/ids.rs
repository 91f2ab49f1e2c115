//! What stands in the two pages by which a guest learns that it is a copy.
//!
//! Both pages lie in memory slots of their own (see [`super::layout`]) and are declared by ACPI.
//! The monitor fills them before the first instruction. When a snapshot is restored or forked it
//! writes them again, sets the events of [`super::interrupts::GED_EVENT_PORT`] and raises the
//! interrupt.

use super::layout::PAGE_SIZE;

/// Offset of the VM generation id in its page, in bytes. It has to be a multiple of 8
/// (Microsoft, "Virtual Machine Generation ID").
pub const VMGENID_OFFSET: u64 = 0;
/// Size of the VM generation id in bytes.
pub const VMGENID_SIZE: usize = 16;

/// `magic` of the VMClock structure: "VCLK".
pub const VMCLOCK_MAGIC: u32 = 0x4B4C_4356;
/// `version` of the structure.
pub const VMCLOCK_VERSION: u16 = 1;

/// `counter_id`: the counter is the TSC.
pub const VMCLOCK_COUNTER_X86_TSC: u8 = 1;
/// `counter_id`: the structure tells of disruptions only; its time fields mean nothing.
pub const VMCLOCK_COUNTER_INVALID: u8 = 0xFF;
/// `time_type`: UTC.
pub const VMCLOCK_TIME_UTC: u8 = 0;
/// `clock_status`: nothing is known.
pub const VMCLOCK_STATUS_UNKNOWN: u8 = 0;
/// A bit of `flags`: `vm_generation_counter` is there.
pub const VMCLOCK_FLAG_VM_GEN_COUNTER_PRESENT: u64 = 1 << 8;
/// A bit of `flags`: each change is announced by an ACPI notification.
pub const VMCLOCK_FLAG_NOTIFICATION_PRESENT: u64 = 1 << 9;

/// The VMClock structure (Linux, `include/uapi/linux/vmclock-abi.h`). Fields are little-endian,
/// as the machine is.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmClock {
    /// [`VMCLOCK_MAGIC`].
    pub magic: u32,
    /// Size in bytes of the region with this structure: one page.
    pub size: u32,
    /// [`VMCLOCK_VERSION`].
    pub version: u16,
    /// Which counter the time fields refer to.
    pub counter_id: u8,
    /// Which time scale the time fields are in.
    pub time_type: u8,
    /// Odd while the fields below are being changed.
    pub seq_count: u32,
    /// Takes a value it never had before when the counter was disrupted.
    pub disruption_marker: u64,
    /// Which of the optional fields are valid.
    pub flags: u64,
    /// Zero.
    pub pad: [u8; 2],
    /// How good the time fields are.
    pub clock_status: u8,
    /// How the neighbourhood smears leap seconds; a hint.
    pub leap_second_smearing_hint: u8,
    /// TAI minus UTC, in seconds.
    pub tai_offset_sec: i16,
    /// Leap second near by.
    pub leap_indicator: u8,
    /// See `counter_period_frac_sec`.
    pub counter_period_shift: u8,
    /// The counter at the time given below.
    pub counter_value: u64,
    /// Period of the counter, in 2^-(64 + `counter_period_shift`) s.
    pub counter_period_frac_sec: u64,
    /// Estimated error of the period, in its unit.
    pub counter_period_esterror_rate_frac_sec: u64,
    /// Largest error of the period, in its unit.
    pub counter_period_maxerror_rate_frac_sec: u64,
    /// The time, in seconds.
    pub time_sec: u64,
    /// The fraction of a second, in 2^-64 s.
    pub time_frac_sec: u64,
    /// Estimated error of the time, in nanoseconds.
    pub time_esterror_nanosec: u64,
    /// Largest error of the time, in nanoseconds.
    pub time_maxerror_nanosec: u64,
    /// Takes a value it never had before when the machine was loaded from a snapshot.
    pub vm_generation_counter: u64,
}

/// Offset of [`VmClock::seq_count`] in the page, in bytes.
pub const VMCLOCK_SEQ_COUNT_OFFSET: u64 = std::mem::offset_of!(VmClock, seq_count) as u64;
/// Offset of [`VmClock::disruption_marker`] in the page, in bytes.
pub const VMCLOCK_DISRUPTION_MARKER_OFFSET: u64 =
    std::mem::offset_of!(VmClock, disruption_marker) as u64;
/// Offset of [`VmClock::flags`] in the page, in bytes.
pub const VMCLOCK_FLAGS_OFFSET: u64 = std::mem::offset_of!(VmClock, flags) as u64;
/// Offset of [`VmClock::vm_generation_counter`] in the page, in bytes.
pub const VMCLOCK_GENERATION_COUNTER_OFFSET: u64 =
    std::mem::offset_of!(VmClock, vm_generation_counter) as u64;

// Guests map this page: an offset that moved is a broken guest, not a number to adapt here.
const _: () = {
    assert!(VMGENID_OFFSET.is_multiple_of(8));
    assert!(size_of::<VmClock>() == 112);
    assert!(VMCLOCK_SEQ_COUNT_OFFSET == 12);
    assert!(VMCLOCK_DISRUPTION_MARKER_OFFSET == 16);
    assert!(VMCLOCK_FLAGS_OFFSET == 24);
    assert!(std::mem::offset_of!(VmClock, clock_status) == 34);
    assert!(std::mem::offset_of!(VmClock, tai_offset_sec) == 36);
    assert!(std::mem::offset_of!(VmClock, counter_value) == 40);
    assert!(std::mem::offset_of!(VmClock, time_sec) == 72);
    assert!(VMCLOCK_GENERATION_COUNTER_OFFSET == 104);
};

// SAFETY: `repr(C)` integers without padding between or behind them (the asserts above leave no
// room for any), so every bit pattern is a value and no byte is uninitialised.
unsafe impl vm_memory::ByteValued for VmClock {}

impl VmClock {
    /// The structure of a machine that boots: it tells of disruptions and generations, and gives
    /// no time, since no counter has been compared with one.
    ///
    /// `marker` is both `disruption_marker` and `vm_generation_counter`, and `seq_count` as far as it fits: a
    /// guest that was just reading when it was saved has to see that it read of two machines.
    pub fn new(marker: u64) -> Self {
        Self {
            magic: VMCLOCK_MAGIC,
            size: PAGE_SIZE as u32,
            version: VMCLOCK_VERSION,
            counter_id: VMCLOCK_COUNTER_INVALID,
            time_type: VMCLOCK_TIME_UTC,
            seq_count: marker as u32 & !1,
            disruption_marker: marker,
            flags: VMCLOCK_FLAG_VM_GEN_COUNTER_PRESENT | VMCLOCK_FLAG_NOTIFICATION_PRESENT,
            pad: [0; 2],
            clock_status: VMCLOCK_STATUS_UNKNOWN,
            leap_second_smearing_hint: 0,
            tai_offset_sec: 0,
            leap_indicator: 0,
            counter_period_shift: 0,
            counter_value: 0,
            counter_period_frac_sec: 0,
            counter_period_esterror_rate_frac_sec: 0,
            counter_period_maxerror_rate_frac_sec: 0,
            time_sec: 0,
            time_frac_sec: 0,
            time_esterror_nanosec: 0,
            time_maxerror_nanosec: 0,
            vm_generation_counter: marker,
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::ByteValued;

    use super::*;

    #[test]
    fn bytes_are_where_the_abi_has_them() {
        let clock = VmClock::new(0x1122_3344_5566_7788);
        let bytes = clock.as_slice();
        assert_eq!(&bytes[..4], b"VCLK");
        assert_eq!(bytes[4..8], 0x1000u32.to_le_bytes());
        assert_eq!(bytes[8..10], 1u16.to_le_bytes());
        assert_eq!(bytes[10], 0xFF);
        assert_eq!(bytes[12..16], 0x5566_7788u32.to_le_bytes());
        assert_eq!(bytes[16..24], 0x1122_3344_5566_7788u64.to_le_bytes());
        assert_eq!(bytes[24..32], 0x300u64.to_le_bytes());
        assert_eq!(bytes[104..112], 0x1122_3344_5566_7788u64.to_le_bytes());
    }
}
