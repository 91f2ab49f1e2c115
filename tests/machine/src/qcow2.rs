//! qcow2 images for tests, which need no program for that.

/// Bytes of a cluster.
pub const CLUSTER: usize = 1 << 16;

/// An empty image of version 3 (QEMU's docs/interop/qcow2): header, refcount table, refcount block, L1 table. Its
/// disk has `size` bytes; `backing` is the name of what it stands on, and the format.
pub fn image(size: u64, backing: Option<(&str, &str)>) -> Vec<u8> {
    let mut image = vec![0; 4 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3_u32.to_be_bytes());
    put(20, &16_u32.to_be_bytes());
    put(24, &size.to_be_bytes());
    put(36, &1_u32.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &4_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    if let Some((name, format)) = backing {
        put(8, &200_u64.to_be_bytes());
        put(16, &(name.len() as u32).to_be_bytes());
        put(104, &0xe279_2aca_u32.to_be_bytes());
        put(108, &(format.len() as u32).to_be_bytes());
        put(112, format.as_bytes());
        put(200, name.as_bytes());
    }
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    for cluster in 0..4 {
        put(2 * CLUSTER + 2 * cluster, &1_u16.to_be_bytes());
    }
    image
}
