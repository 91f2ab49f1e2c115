//! What is left of an overlay when the power goes.

use super::*;

/// The overlay at `top` as a power cut may leave it: what is not known to be on the disk of its data is not,
/// and what else was written is. Read on another start of the host.
fn after_a_power_cut(folder: &Folder, durable: &[u8]) -> Vec<u8> {
    let mut bytes = fs::read(folder.path("top")).unwrap();
    let start = (bytes.len() as u64 - SIZE) as usize;
    bytes[start..].copy_from_slice(&durable[start..]);
    let mut note = super::super::super::overlay::Note::parse(&bytes[4096..8192]);
    note.boot = note.boot.map(|_| [3; 16]);
    bytes[4096..8192].copy_from_slice(&note.to_page()[..]);
    fs::write(folder.path("cut"), bytes).unwrap();
    contents(folder.open("cut"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// After each operation the power may go.
    #[test]
    fn a_power_cut_takes_nothing_that_was_flushed(
        steps in proptest::collection::vec((0..SIZE / 512, 1u64..24, 1u8.., any::<bool>()), 1..24),
        pauses: bool)
    {
        let mut harness = running(Cache::Writeback, 1);
        let base = harness.device().1.bytes.clone();
        let mut durable = fs::read(harness.device().1.path("top")).unwrap();
        // Each sector as it was flushed, and all that was written to it since.
        let mut allowed: Vec<Vec<u8>> = base.chunks(512).map(|sector| vec![sector[0]]).collect();
        let first = |bytes: &[u8]| bytes.chunks(512).map(|sector| sector[0]).collect::<Vec<_>>();
        for (sector, len, byte, flush) in steps {
            let len = len.min(SIZE / 512 - sector);
            let range = sector as usize..(sector + len) as usize;
            allowed[range.clone()].iter_mut().for_each(|allowed| allowed.push(byte));
            harness.hold_operations(true);
            let data = vec![byte; len as usize * 512];
            let mut requests = vec![Request::new(&mut harness, OUT, sector, &data, 0)];
            if flush {
                requests.push(Request::new(&mut harness, FLUSH, 0, &[], 0));
            }
            for request in &requests {
                harness.offer(0, &request.buffers);
                harness.kick(0);
                harness.run();
                while let Some(operation) = harness.oldest_operation() {
                    let is_sync = matches!(operation.action, Action::Sync);
                    harness.finish_operation();
                    if is_sync {
                        durable = fs::read(harness.device().1.path("top")).unwrap();
                    }
                    let found = after_a_power_cut(&harness.device().1, &durable);
                    for (found, allowed) in first(&found).iter().zip(&allowed) {
                        prop_assert!(allowed.contains(found), "{found} is none of {allowed:?}");
                    }
                    harness.run();
                }
                prop_assert!(harness.used(0).is_some());
                prop_assert_eq!(harness.read(request.status, 1), vec![OK]);
            }
            harness.hold_operations(false);
            if pauses {
                harness.pause();
                harness.resume();
            }
            if flush {
                for allowed in &mut allowed {
                    allowed.drain(..allowed.len() - 1);
                }
            }
            let found = after_a_power_cut(&harness.device().1, &durable);
            for (found, allowed) in first(&found).iter().zip(&allowed) {
                prop_assert!(allowed.contains(found), "{found} is none of {allowed:?}");
            }
        }
    }
}
