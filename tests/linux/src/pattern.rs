//! Bytes that both ends of a transfer make for themselves: what comes is compared with what was sent,
//! byte by byte, which is stricter than any sum of it.

/// A sequence without a period that a ring, a page or a segment could hide.
pub struct Pattern {
    state: u64,
    word: [u8; 8],
    /// How many bytes of `word` were given.
    given: usize,
}

impl Pattern {
    /// The sequence of `seed`; each has its own.
    pub fn new(seed: u64) -> Pattern {
        // Neighbouring seeds start far from each other; only zero must not be.
        let state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        Pattern { state, word: [0; 8], given: 8 }
    }

    /// The first `length` bytes of the sequence of `seed`.
    pub fn bytes(seed: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        Pattern::new(seed).fill(&mut bytes);
        bytes
    }

    /// Gives the next bytes.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        let (begun, rest) = bytes.split_at_mut(bytes.len().min(8 - self.given));
        begun.copy_from_slice(&self.word[self.given..self.given + begun.len()]);
        self.given += begun.len();
        for piece in rest.chunks_mut(8) {
            self.word = self.next().to_le_bytes();
            self.given = piece.len();
            piece.copy_from_slice(&self.word[..piece.len()]);
        }
    }

    /// Whether the next bytes are these.
    pub fn continues_with(&mut self, bytes: &[u8]) -> bool {
        let mut wanted = vec![0; bytes.len()];
        self.fill(&mut wanted);
        wanted == bytes
    }

    /// xorshift64*, Vigna 2016.
    fn next(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
}

#[cfg(test)]
mod tests {
    use super::Pattern;

    /// However it is cut, it is one sequence.
    #[test]
    fn pieces_are_the_whole() {
        let whole = Pattern::bytes(5, 1000);
        let mut pattern = Pattern::new(5);
        let mut rest = &whole[..];
        for length in [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 100, 822] {
            let (piece, more) = rest.split_at(length);
            assert!(pattern.continues_with(piece));
            rest = more;
        }
        assert!(rest.is_empty());
        assert!(!Pattern::new(6).continues_with(&whole));
    }
}
