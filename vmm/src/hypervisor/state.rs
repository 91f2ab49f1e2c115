//! What KVM knows of a machine, read and written as one: for a machine that is saved and goes on in
//! another process.
//!
//! The structures are those of KVM's own interface, which does not change. As payloads they stand one
//! behind the other, lists behind their lengths.

use std::time::Duration;

use devices::virtio::device::{Payload, RestoreError};
use kvm_bindings::{
    KVM_CLOCK_REALTIME, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// State of a vCPU that is not in the guest.
#[derive(Debug)]
pub struct VcpuState {
    /// Frequency of its TSC in kHz.
    pub tsc_khz: u32,
    /// Running, halted, waiting for a start-up interrupt.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segment and control registers.
    pub sregs: kvm_sregs,
    /// Floating point and vector registers.
    pub xsave: Box<kvm_xsave>,
    /// Which of those the guest uses.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug: kvm_debugregs,
    /// Local APIC.
    pub lapic: Box<kvm_lapic_state>,
    /// Pending exceptions and interrupts.
    pub events: kvm_vcpu_events,
    /// What CPUID says.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Model-specific registers that can be read and written.
    pub msrs: Vec<kvm_msr_entry>,
}

/// State of what all vCPUs share.
#[derive(Debug)]
pub struct VmState {
    /// The two PICs and the IOAPIC, in KVM's order.
    pub irqchips: [Box<kvm_irqchip>; 3],
    /// The timer.
    pub pit: kvm_pit_state2,
    /// The guest's clock (kvmclock), in nanoseconds.
    pub clock: kvm_clock_data,
}

const VCPU: &str = "vcpu";
const VM: &str = "vm";
const VERSION: u16 = 1;

/// Most elements of a list: KVM has fewer CPUID leaves and registers.
const LONGEST: usize = 4096;

/// IA32_TIME_STAMP_COUNTER (Intel SDM volume 4).
pub(super) const TSC: u32 = 0x10;

impl VcpuState {
    /// Has its TSC count as if it had run for so much longer.
    pub fn advance(&mut self, time: Duration) {
        let ticks = time.as_nanos() * u128::from(self.tsc_khz) / 1_000_000;
        for msr in self.msrs.iter_mut().filter(|msr| msr.index == TSC) {
            // It is 64 bits wide and wraps.
            msr.data = msr.data.wrapping_add(ticks as u64);
        }
    }

    /// As a payload.
    pub fn save(&self) -> Payload {
        let mut bytes = Writer::default();
        bytes.put(&self.tsc_khz);
        bytes.put(&self.mp_state);
        bytes.put(&self.regs);
        bytes.put(&self.sregs);
        bytes.put(&*self.xsave);
        bytes.put(&self.xcrs);
        bytes.put(&self.debug);
        bytes.put(&*self.lapic);
        bytes.put(&self.events);
        bytes.list(&self.cpuid);
        bytes.list(&self.msrs);
        Payload { kind: VCPU, version: VERSION, bytes: bytes.0 }
    }

    /// From a payload.
    ///
    /// # Errors
    /// It is another's, or not as long as it should be.
    pub fn restore(payload: &Payload) -> Result<VcpuState, RestoreError> {
        let mut bytes = Reader { rest: payload.expect(VCPU, VERSION)?, kind: VCPU };
        let state = VcpuState {
            tsc_khz: bytes.take()?,
            mp_state: bytes.take()?,
            regs: bytes.take()?,
            sregs: bytes.take()?,
            xsave: Box::new(bytes.take()?),
            xcrs: bytes.take()?,
            debug: bytes.take()?,
            lapic: Box::new(bytes.take()?),
            events: bytes.take()?,
            cpuid: bytes.list()?,
            msrs: bytes.list()?,
        };
        bytes.end(state)
    }
}

impl VmState {
    /// Has the guest's clock stand as if it had run for so much longer.
    pub fn advance(&mut self, time: Duration) {
        let time = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.clock.clock = self.clock.clock.saturating_add(time);
    }

    /// The host's time when the clock stood so, since 1970, if KVM said it.
    pub fn host_time(&self) -> Option<Duration> {
        let said = self.clock.flags & KVM_CLOCK_REALTIME != 0;
        said.then(|| Duration::from_nanos(self.clock.realtime))
    }

    /// As a payload.
    pub fn save(&self) -> Payload {
        let mut bytes = Writer::default();
        for chip in &self.irqchips {
            bytes.put(&**chip);
        }
        bytes.put(&self.pit);
        bytes.put(&self.clock);
        Payload { kind: VM, version: VERSION, bytes: bytes.0 }
    }

    /// From a payload.
    ///
    /// # Errors
    /// It is another's, or not as long as it should be.
    pub fn restore(payload: &Payload) -> Result<VmState, RestoreError> {
        let mut bytes = Reader { rest: payload.expect(VM, VERSION)?, kind: VM };
        let state = VmState {
            irqchips: [Box::new(bytes.take()?), Box::new(bytes.take()?), Box::new(bytes.take()?)],
            pit: bytes.take()?,
            clock: bytes.take()?,
        };
        bytes.end(state)
    }
}

#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn put<T: IntoBytes + Immutable>(&mut self, value: &T) {
        self.0.extend_from_slice(value.as_bytes());
    }

    fn list<T: IntoBytes + Immutable>(&mut self, values: &[T]) {
        // No list is longer than [`LONGEST`].
        self.put(&(values.len() as u32));
        for value in values {
            self.put(value);
        }
    }
}

struct Reader<'a> {
    rest: &'a [u8],
    kind: &'static str,
}

impl Reader<'_> {
    fn invalid(&self, reason: &'static str) -> RestoreError {
        RestoreError::Invalid { kind: self.kind, reason }
    }

    fn take<T: FromBytes>(&mut self) -> Result<T, RestoreError> {
        let (value, rest) =
            T::read_from_prefix(self.rest).map_err(|_| self.invalid("it is too short"))?;
        self.rest = rest;
        Ok(value)
    }

    fn list<T: FromBytes>(&mut self) -> Result<Vec<T>, RestoreError> {
        let len: u32 = self.take()?;
        let len = usize::try_from(len).ok().filter(|len| *len <= LONGEST);
        let len = len.ok_or_else(|| self.invalid("a list is too long"))?;
        (0..len).map(|_| self.take()).collect()
    }

    fn end<T>(&self, value: T) -> Result<T, RestoreError> {
        match self.rest {
            [] => Ok(value),
            _ => Err(self.invalid("it is too long")),
        }
    }
}

// Saved states hold these structures as they are: a size that changed is another format.
const _: () = {
    assert!(size_of::<kvm_mp_state>() == 4);
    assert!(size_of::<kvm_regs>() == 144);
    assert!(size_of::<kvm_sregs>() == 312);
    assert!(size_of::<kvm_xsave>() == 4096);
    assert!(size_of::<kvm_xcrs>() == 392);
    assert!(size_of::<kvm_debugregs>() == 128);
    assert!(size_of::<kvm_lapic_state>() == 1024);
    assert!(size_of::<kvm_vcpu_events>() == 64);
    assert!(size_of::<kvm_cpuid_entry2>() == 40);
    assert!(size_of::<kvm_msr_entry>() == 16);
    assert!(size_of::<kvm_irqchip>() == 520);
    assert!(size_of::<kvm_pit_state2>() == 112);
    assert!(size_of::<kvm_clock_data>() == 48);
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_are_moved_on_by_the_same_time() {
        // A payload of zeroes is a state of zeroes, without lists.
        let blank = |kind, len| Payload { kind, version: VERSION, bytes: vec![0; len] };
        let sized = (0..8192).find_map(|len| VcpuState::restore(&blank(VCPU, len)).ok());
        let mut vcpu = sized.expect("a state of zeroes");
        vcpu.tsc_khz = 2_500_000;
        let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
        vcpu.msrs = vec![msr(TSC, u64::MAX - 4), msr(0x174, 7)];
        let time = Duration::from_micros(2);
        vcpu.advance(time);
        // 5,000 ticks, over the end; other registers stay.
        assert_eq!(vcpu.msrs.iter().map(|msr| msr.data).collect::<Vec<_>>(), [4995, 7]);
        let sized = (0..8192).find_map(|len| VmState::restore(&blank(VM, len)).ok());
        let mut vm = sized.expect("a state of zeroes");
        assert_eq!(vm.host_time(), None);
        vm.clock.flags = KVM_CLOCK_REALTIME;
        (vm.clock.clock, vm.clock.realtime) = (10, 3_000_000_000);
        vm.advance(time);
        assert_eq!((vm.clock.clock, vm.host_time()), (2010, Some(Duration::from_secs(3))));
        vm.advance(Duration::MAX);
        assert_eq!(vm.clock.clock, u64::MAX);
    }
}
