//! ACPI tables of a hardware-reduced machine (ACPI 6.5).
//!
//! What a stock kernel needs to find CPUs, the serial port and virtio-mmio devices, to power off
//! and to reset, and to hear of events: RSDP, XSDT, FADT, MADT and a DSDT. There is no FACS, no
//! SCI and no PM timer; a kernel that has been told `HW_REDUCED` looks for none.
//!
//! Events come through a Generic Event Device on one interrupt. Its `_EVT` reads the byte at
//! [`GED_EVENT_PORT`], which says what happened and is cleared by being read, and notifies the
//! devices concerned:
//!
//! ```text
//!   bit 0  \_SB.PWRB  PNP0C0C         power button
//!   bit 1  \_SB.VGID  VM_Gen_Counter  VM generation id changed
//!   bit 2  \_SB.VCLK  AMZNC10C        VMClock page changed
//! ```

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use super::interrupts::{
    GED_EVENT_PORT, I8042_COMMAND_PORT, I8042_RESET, SLEEP_CONTROL_PORT, SLEEP_STATUS_PORT,
};
use super::layout::{self, VirtioSlot};

mod dsdt;
mod madt;

const OEM_ID: [u8; 6] = *b"HULL  ";
const OEM_TABLE_ID: [u8; 8] = *b"HULLVM  ";
const OEM_REVISION: u32 = 1;

/// IAPC_BOOT_ARCH (ACPI 6.5 § 5.2.9.3): there is an i8042.
const BOOT_ARCH_8042: u16 = 1 << 1;
/// There is no VGA to probe for.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
/// There is no CMOS clock.
const BOOT_ARCH_NO_CMOS_RTC: u16 = 1 << 5;

/// What the tables describe.
#[derive(Clone, Debug, Default)]
pub struct AcpiConfig {
    /// Number of vCPUs, 1 to [`super::MAX_VCPUS`]; their APIC ids are from 0 on.
    pub cpus: u8,
    /// The virtio-mmio devices, at most [`super::interrupts::MAX_VIRTIO_DEVICES`].
    pub virtio: Vec<VirtioSlot>,
    /// Whether COM1 is there.
    pub serial: bool,
    /// Whether an i8042 keyboard controller is there. Its reset line is, always.
    pub i8042: bool,
    /// Whether the VM generation id page is there.
    pub vmgenid: bool,
    /// Whether the VMClock page is there.
    pub vmclock: bool,
}

/// A table and its place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiTable {
    /// Its signature, such as `FACP`; `RSD ` for the RSDP.
    pub signature: [u8; 4],
    /// Its guest-physical address.
    pub address: u64,
    /// Its bytes, checksum included.
    pub bytes: Vec<u8>,
}

/// All tables, placed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiTables {
    /// The tables by ascending address; the RSDP is the first.
    pub tables: Vec<AcpiTable>,
}

/// Why there are no ACPI tables.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// They need more room than there is.
    #[error("the ACPI tables need {size} bytes, there is room for {room}")]
    TooLarge {
        /// Bytes needed.
        size: u64,
        /// Bytes there.
        room: u64,
    },
    /// They could not be written.
    #[error("cannot write the ACPI table {signature} at {address:#x}")]
    Write {
        /// Its signature.
        signature: String,
        /// Its guest-physical address.
        address: u64,
        /// What guest memory said.
        source: GuestMemoryError,
    },
}

/// Makes the tables for the machine that `config` describes, and places them from
/// [`layout::ACPI_START`] on.
///
/// # Errors
///
/// [`AcpiError::TooLarge`], which no configuration within its documented bounds reaches.
pub fn build(config: &AcpiConfig) -> Result<AcpiTables, AcpiError> {
    // The RSDP comes first, and is written last: it is the only one whose size is known before.
    let mut next = layout::ACPI_START + Rsdp::len() as u64;
    let mut tables = Vec::new();
    let mut place = |signature: &[u8; 4], bytes: Vec<u8>| {
        let address = next.next_multiple_of(16);
        next = address + bytes.len() as u64;
        tables.push(AcpiTable { signature: *signature, address, bytes });
        address
    };

    let dsdt = place(b"DSDT", dsdt::build(config));
    let fadt = place(b"FACP", fadt(config, dsdt));
    let madt = place(b"APIC", madt::build(config.cpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(b"XSDT", to_bytes(&xsdt));
    let rsdp = to_bytes(&Rsdp::new(OEM_ID, xsdt));
    tables.insert(0, AcpiTable { signature: *b"RSD ", address: layout::ACPI_START, bytes: rsdp });

    if next > layout::ACPI_END {
        return Err(AcpiError::TooLarge {
            size: next - layout::ACPI_START,
            room: layout::ACPI_END - layout::ACPI_START,
        });
    }
    Ok(AcpiTables { tables })
}

impl AcpiTables {
    /// Guest-physical address of the RSDP, for the boot protocol.
    pub fn rsdp(&self) -> u64 {
        layout::ACPI_START
    }

    /// Writes the tables to guest memory.
    ///
    /// # Errors
    ///
    /// Guest memory does not reach to [`layout::ACPI_END`].
    pub fn write<M: GuestMemoryBackend>(&self, memory: &M) -> Result<(), AcpiError> {
        for table in &self.tables {
            memory.write_slice(&table.bytes, GuestAddress(table.address)).map_err(|source| {
                AcpiError::Write {
                    signature: String::from_utf8_lossy(&table.signature).into_owned(),
                    address: table.address,
                    source,
                }
            })?;
        }
        Ok(())
    }
}

/// The Fixed ACPI Description Table, revision 6 (ACPI 6.5 § 5.2.9).
fn fadt(config: &AcpiConfig, dsdt: u64) -> Vec<u8> {
    let port =
        |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        // Set, these two say that the buttons are no fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    let i8042 = if config.i8042 { BOOT_ARCH_8042 } else { 0 };
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_CMOS_RTC | i8042).into();
    fadt.reset_reg = port(I8042_COMMAND_PORT);
    fadt.reset_value = I8042_RESET;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"HULLHULL").into();
    to_bytes(&fadt.finalize())
}

/// A system description table with `body` behind its header.
fn sdt(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    const HEADER_SIZE: u32 = 36;
    let mut table = Sdt::new(signature, HEADER_SIZE, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(body);
    table.as_slice().to_vec()
}

fn to_bytes(object: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests;
