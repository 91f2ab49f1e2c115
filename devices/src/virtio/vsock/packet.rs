//! What travels in the queues: a header of 44 bytes, then the bytes of a stream.

/// Bytes of the header (virtio 1.3 § 5.10.6).
pub(super) const HEADER_LEN: usize = 44;

/// The host's address (§ 5.10.4).
pub(super) const HOST_CID: u64 = 2;

/// VIRTIO_VSOCK_TYPE_STREAM.
const TYPE_STREAM: u16 = 1;

/// VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: the sender will receive no more.
pub(super) const NO_RECEIVE: u32 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_SEND: the sender will send no more.
pub(super) const NO_SEND: u32 = 2;
/// Neither direction is used any more.
pub(super) const NEITHER: u32 = NO_RECEIVE | NO_SEND;

/// Operations (§ 5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    fn new(value: u16) -> Option<Op> {
        Some(match value {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Reset,
            4 => Op::Shutdown,
            5 => Op::Data,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            _ => return None,
        })
    }
}

/// The two ports of a connection, each on its side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// A header as the guest wrote it.
#[derive(Clone, Copy, Debug)]
pub(super) struct FromGuest {
    pub(super) source: u64,
    pub(super) destination: u64,
    pub(super) ports: Ports,
    /// Bytes that follow, as the guest says.
    pub(super) len: u32,
    /// `None` is an operation that there is not.
    pub(super) op: Option<Op>,
    pub(super) stream: bool,
    pub(super) flags: u32,
    pub(super) buffer: u32,
    pub(super) forwarded: u32,
    kind: u16,
}

impl FromGuest {
    pub(super) fn new(bytes: &[u8; HEADER_LEN]) -> FromGuest {
        let mut rest = bytes.as_slice();
        let mut next = |len: usize| -> u64 {
            let (field, after) = rest.split_at(len.min(rest.len()));
            rest = after;
            field.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
        };
        let (source, destination) = (next(8), next(8));
        let ports = Ports { guest: next(4) as u32, host: next(4) as u32 };
        let len = next(4) as u32;
        let kind = next(2) as u16;
        FromGuest {
            source,
            destination,
            ports,
            len,
            stream: kind == TYPE_STREAM,
            kind,
            op: Op::new(next(2) as u16),
            flags: next(4) as u32,
            buffer: next(4) as u32,
            forwarded: next(4) as u32,
        }
    }

    /// The answer to a packet that belongs to nothing: back the way that it came.
    pub(super) fn refusal(&self) -> ToGuest {
        ToGuest {
            source: self.destination,
            destination: Some(self.source),
            kind: self.kind,
            ..ToGuest::new(Op::Reset, self.ports)
        }
    }
}

/// A header for the guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct ToGuest {
    pub(super) source: u64,
    /// Where it goes if not to the guest's address.
    pub(super) destination: Option<u64>,
    pub(super) ports: Ports,
    pub(super) op: Op,
    pub(super) kind: u16,
    pub(super) len: u32,
    pub(super) flags: u32,
    pub(super) buffer: u32,
    pub(super) forwarded: u32,
}

impl ToGuest {
    pub(super) fn new(op: Op, ports: Ports) -> ToGuest {
        ToGuest {
            source: HOST_CID,
            destination: None,
            ports,
            op,
            kind: TYPE_STREAM,
            len: 0,
            flags: 0,
            buffer: 0,
            forwarded: 0,
        }
    }

    /// The bytes, for the guest with this address.
    pub(super) fn bytes(&self, guest: u64) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..8].copy_from_slice(&self.source.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.destination.unwrap_or(guest).to_le_bytes());
        bytes[16..20].copy_from_slice(&self.ports.host.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.ports.guest.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&(self.op as u16).to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buffer.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.forwarded.to_le_bytes());
        bytes
    }
}
