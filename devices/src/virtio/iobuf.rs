//! A scatter-gather list of host memory that a descriptor chain points to.
//!
//! The guest may change the bytes at any time, so they are only ever copied, never borrowed.

use libc::iovec;

/// Buffers of one direction of one descriptor chain, consumed from the front.
///
/// Every element points into guest RAM that stays mapped while the queue's
/// [`Memory`](crate::memory::Memory) lives; [`Queue`](super::queue::Queue) is the only maker.
#[derive(Debug, Default)]
pub struct IoBuf {
    iovecs: Vec<iovec>,
    first: usize,
    len: u64,
}

// SAFETY: the pointers refer to guest RAM, which any thread may access through raw copies.
unsafe impl Send for IoBuf {}

impl IoBuf {
    pub(super) fn clear(&mut self) {
        self.iovecs.clear();
        self.first = 0;
        self.len = 0;
    }

    pub(super) fn push(&mut self, host: *mut u8, len: u32) {
        self.iovecs.push(iovec { iov_base: host.cast(), iov_len: len as usize });
        self.len += u64::from(len);
    }

    /// Bytes left.
    #[inline]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True if nothing is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The buffers left, for a vectored system call.
    #[inline]
    pub fn iovecs(&self) -> &[iovec] {
        &self.iovecs[self.first..]
    }

    /// Drops the first `count` bytes, at most what is left.
    pub fn advance(&mut self, count: u64) {
        let mut count = count.min(self.len);
        self.len -= count;
        while let Some(iov) = self.iovecs.get_mut(self.first).filter(|_| count > 0) {
            let step = (iov.iov_len as u64).min(count);
            // SAFETY: step is at most the element's length, so the pointer stays in its buffer.
            iov.iov_base = unsafe { iov.iov_base.cast::<u8>().add(step as usize) }.cast();
            iov.iov_len -= step as usize;
            count -= step;
            if iov.iov_len == 0 {
                self.first += 1;
            }
        }
    }

    /// Shortens the list to its first `count` bytes. No effect if fewer are left.
    pub fn truncate(&mut self, count: u64) {
        let mut keep = count.min(self.len);
        self.len = keep;
        let mut end = self.first;
        for iov in &mut self.iovecs[self.first..] {
            if keep == 0 {
                break;
            }
            iov.iov_len = (iov.iov_len as u64).min(keep) as usize;
            keep -= iov.iov_len as u64;
            end += 1;
        }
        self.iovecs.truncate(end);
    }

    /// Copies bytes from the front into `data` and consumes them. Returns how many, at most
    /// `data.len()`.
    pub fn read(&mut self, data: &mut [u8]) -> usize {
        self.copy(data.len(), |guest, offset, len| {
            // SAFETY: `copy` hands out `len` readable bytes of guest RAM and offsets that stay
            // within `data`; host memory of ours never overlaps guest RAM.
            unsafe { std::ptr::copy_nonoverlapping(guest, data.as_mut_ptr().add(offset), len) };
        })
    }

    /// Copies bytes from `offset` on into `data` without consuming them. Returns how many, at most
    /// `data.len()`.
    #[inline]
    pub fn peek(&self, offset: u64, data: &mut [u8]) -> usize {
        let mut skip = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut done = 0;
        for iov in self.iovecs() {
            if skip >= iov.iov_len {
                skip -= iov.iov_len;
                continue;
            }
            let len = (iov.iov_len - skip).min(data.len() - done);
            if len == 0 {
                break;
            }
            // SAFETY: `skip + len` is at most the length of this buffer of guest RAM, `done + len`
            // that of `data`; the two never overlap.
            unsafe {
                let from = iov.iov_base.cast::<u8>().add(skip);
                std::ptr::copy_nonoverlapping(from, data.as_mut_ptr().add(done), len);
            }
            done += len;
            skip = 0;
        }
        done
    }

    /// Copies `data` to the front and consumes the space. Returns how many bytes fitted.
    pub fn write(&mut self, data: &[u8]) -> usize {
        self.copy(data.len(), |guest, offset, len| {
            // SAFETY: as in `read`, with the direction reversed; guest RAM is mapped writable.
            unsafe { std::ptr::copy_nonoverlapping(data.as_ptr().add(offset), guest, len) };
        })
    }

    /// Takes the last byte off the list, to be written later. `None` if the list is empty.
    pub fn pop_last_byte(&mut self) -> Option<GuestByte> {
        let iov = self.iovecs[self.first..].last_mut()?;
        iov.iov_len = iov.iov_len.checked_sub(1)?;
        // SAFETY: the new length is the index of what was the last byte of the buffer.
        let byte = unsafe { iov.iov_base.cast::<u8>().add(iov.iov_len) };
        if iov.iov_len == 0 {
            self.iovecs.pop();
        }
        self.len -= 1;
        Some(GuestByte(byte))
    }

    fn copy(&mut self, max: usize, mut each: impl FnMut(*mut u8, usize, usize)) -> usize {
        let mut done = 0;
        for iov in &self.iovecs[self.first..] {
            let len = iov.iov_len.min(max - done);
            if len == 0 {
                break;
            }
            each(iov.iov_base.cast(), done, len);
            done += len;
        }
        self.advance(done as u64);
        done
    }
}

/// One writable byte of guest memory, set aside for a status that is written last.
#[derive(Debug)]
pub struct GuestByte(*mut u8);

// SAFETY: as for IoBuf.
unsafe impl Send for GuestByte {}

impl GuestByte {
    /// Stores `value`.
    pub fn set(&self, value: u8) {
        // SAFETY: made by IoBuf from a byte inside guest RAM, which outlives the queue.
        unsafe { self.0.write_volatile(value) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn buf_over(parts: &mut [Vec<u8>]) -> IoBuf {
        let mut buf = IoBuf::default();
        for part in parts {
            buf.push(part.as_mut_ptr(), part.len() as u32);
        }
        buf
    }

    #[test]
    fn last_byte_is_set_aside() {
        let mut parts = vec![vec![1u8, 2], vec![3u8]];
        let mut buf = buf_over(&mut parts);
        buf.pop_last_byte().unwrap().set(9);
        assert_eq!(buf.len(), 2);
        buf.pop_last_byte().unwrap().set(8);
        assert_eq!(buf.iovecs().len(), 1);
        assert!(buf.pop_last_byte().is_some());
        assert!(buf.pop_last_byte().is_none());
        assert_eq!(parts, vec![vec![1, 8], vec![9]]);
    }

    proptest! {
        #[test]
        fn behaves_like_one_flat_buffer(
            sizes in proptest::collection::vec(1usize..20, 1..6),
            ops in proptest::collection::vec((0u8..3, 0usize..30), 0..10))
        {
            let total: usize = sizes.iter().sum();
            let mut flat: Vec<u8> = (0..total).map(|i| i as u8).collect();
            let mut next = 0u8;
            let mut parts: Vec<Vec<u8>> = sizes.iter().map(|&n| (0..n).map(|_| {
                let v = next; next += 1; v
            }).collect()).collect();
            let mut buf = buf_over(&mut parts);
            for (_, offset) in &ops {
                let mut data = vec![0; 13];
                let got = buf.peek(*offset as u64, &mut data);
                let rest = flat.get(*offset..).unwrap_or_default();
                prop_assert_eq!(&data[..got], &rest[..rest.len().min(13)]);
            }
            let (mut at, mut end) = (0, total);
            for (op, n) in ops {
                match op {
                    0 => {
                        let mut data = vec![0; n];
                        let got = buf.read(&mut data);
                        prop_assert_eq!(got, n.min(end - at));
                        prop_assert_eq!(&data[..got], &flat[at..at + got]);
                        at += got;
                    }
                    1 => {
                        let got = buf.write(&vec![0xee; n]);
                        prop_assert_eq!(got, n.min(end - at));
                        flat[at..at + got].fill(0xee);
                        at += got;
                    }
                    _ => {
                        buf.truncate(n as u64);
                        end = end.min(at + n);
                    }
                }
                prop_assert_eq!(buf.len(), (end - at) as u64);
                let sum: usize = buf.iovecs().iter().map(|v| v.iov_len).sum();
                prop_assert_eq!(sum, end - at);
            }
            prop_assert_eq!(parts.concat(), flat);
        }
    }
}
