//! From a loaded kernel to the state that vCPU 0 starts in.
//!
//! [`linux64`] and [`pvh`] write what their protocol wants in memory and say how the CPU enters;
//! [`cpu_state`] turns that into registers; [`placement`] decides where an initrd goes and
//! whether everything has its place. The other vCPUs wait for their start-up interrupt in the
//! state KVM gives them.

pub mod cpu_state;
pub mod linux64;
pub mod placement;
pub mod pvh;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::layout;

/// Where an initrd was loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initrd {
    /// Its guest-physical address, page-aligned.
    pub address: u64,
    /// Its length in bytes.
    pub size: u64,
}

/// The CPU mode a kernel is entered in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryMode {
    /// 64-bit, paging on, memory mapped one to one (Linux boot protocol).
    Long,
    /// 32-bit protected mode, flat segments, paging off (PVH).
    Protected,
}

/// How vCPU 0 starts. [`cpu_state`] makes registers of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The mode.
    pub mode: EntryMode,
    /// The first instruction's guest-physical address.
    pub address: u64,
    /// Guest-physical address of the protocol's structure: the zero page, which RSI points to, or
    /// the PVH start info, which EBX points to.
    pub info: u64,
}

/// Why a kernel cannot be told how to boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The command line does not fit.
    #[error("the kernel command line has {length} bytes, this kernel takes {max}")]
    CmdlineTooLong {
        /// Its length in bytes, without NUL.
        length: usize,
        /// The longest possible.
        max: usize,
    },
    /// The command line has a NUL byte inside, where a kernel would stop reading.
    #[error("the kernel command line has a NUL byte at position {position}")]
    CmdlineNul {
        /// Position of the first one, from 0.
        position: usize,
    },
    /// The entry point is beyond what the entry mode reaches.
    #[error("the kernel's entry point {address:#x} is out of reach")]
    EntryOutOfReach {
        /// The entry point.
        address: u64,
    },
    /// There is no RAM where something has to go.
    #[error("cannot write {what} at {address:#x}")]
    Write {
        /// What was to be written.
        what: &'static str,
        /// Its guest-physical address.
        address: u64,
        /// What guest memory said.
        source: vm_memory::GuestMemoryError,
    },
}

/// Writes the command line with its NUL at [`layout::CMDLINE`]; `max` is the longest one the
/// kernel takes, in bytes without NUL, and at most [`layout::CMDLINE_SIZE`] - 1 is allowed.
fn write_cmdline<M: GuestMemoryBackend>(
    memory: &M,
    cmdline: &[u8],
    max: usize,
) -> Result<(), BootError> {
    let max = max.min(layout::CMDLINE_SIZE - 1);
    if cmdline.len() > max {
        return Err(BootError::CmdlineTooLong { length: cmdline.len(), max });
    }
    if let Some(position) = cmdline.iter().position(|&byte| byte == 0) {
        return Err(BootError::CmdlineNul { position });
    }
    let mut bytes = Vec::with_capacity(cmdline.len() + 1);
    bytes.extend_from_slice(cmdline);
    bytes.push(0);
    write(memory, "the command line", &bytes, layout::CMDLINE)
}

fn write<M: GuestMemoryBackend>(
    memory: &M,
    what: &'static str,
    bytes: &[u8],
    address: u64,
) -> Result<(), BootError> {
    memory.write_slice(bytes, GuestAddress(address)).map_err(|source| BootError::Write {
        what,
        address,
        source,
    })
}

#[cfg(test)]
mod tests;
