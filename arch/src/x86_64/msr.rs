//! Model-specific registers a vCPU starts with.
//!
//! What firmware would leave behind before it jumps to a boot loader; everything else keeps the
//! value KVM gives a new vCPU.

use kvm_bindings::kvm_msr_entry;

/// Register numbers (Intel SDM vol. 4, AMD APM vol. 2 appendix A).
mod index {
    pub(super) const TSC: u32 = 0x10;
    pub(super) const SYSENTER_CS: u32 = 0x174;
    pub(super) const SYSENTER_ESP: u32 = 0x175;
    pub(super) const SYSENTER_EIP: u32 = 0x176;
    pub(super) const MISC_ENABLE: u32 = 0x1A0;
    pub(super) const MTRR_DEF_TYPE: u32 = 0x2FF;
    pub(super) const STAR: u32 = 0xC000_0081;
    pub(super) const LSTAR: u32 = 0xC000_0082;
    pub(super) const CSTAR: u32 = 0xC000_0083;
    pub(super) const SYSCALL_MASK: u32 = 0xC000_0084;
    pub(super) const KERNEL_GS_BASE: u32 = 0xC000_0102;
}

/// `IA32_MISC_ENABLE`: fast string operations.
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// `IA32_MTRR_DEF_TYPE`: MTRRs enabled (bit 11), everything write-back (type 6). Without it a
/// kernel takes all of memory for uncacheable.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// The registers to set on each vCPU before its first instruction, for `KVM_SET_MSRS`.
///
/// The call reports how many it took; fewer than given means the next one was refused.
pub fn boot_msrs() -> Vec<kvm_msr_entry> {
    [
        (index::SYSENTER_CS, 0),
        (index::SYSENTER_ESP, 0),
        (index::SYSENTER_EIP, 0),
        (index::STAR, 0),
        (index::CSTAR, 0),
        (index::KERNEL_GS_BASE, 0),
        (index::SYSCALL_MASK, 0),
        (index::LSTAR, 0),
        (index::TSC, 0),
        (index::MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        (index::MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ]
    .into_iter()
    .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_write_back_and_no_register_is_set_twice() {
        let msrs = boot_msrs();
        let mut indices: Vec<_> = msrs.iter().map(|m| m.index).collect();
        indices.sort_unstable();
        indices.dedup();
        assert_eq!(indices.len(), msrs.len());
        let mtrr = msrs.iter().find(|m| m.index == 0x2FF).map(|m| m.data);
        assert_eq!(mtrr, Some(0x806));
    }
}
