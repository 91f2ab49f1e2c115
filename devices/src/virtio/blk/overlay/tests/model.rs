//! Overlays against plain bytes, whatever is done with them.

use super::super::super::overlay::{Header, flatten};
use super::*;

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
    Read(u64, u64),
    Flush,
    Fork,
    Reopen,
    Commit,
}

fn step() -> impl Strategy<Value = Step> {
    let sectors = SIZE / 512;
    let span =
        (0..sectors).prop_flat_map(move |first| (Just(first), (1..=(sectors - first).min(40))));
    prop_oneof![
        8 => (span.clone(), any::<u8>()).prop_map(|((at, len), byte)| Step::Write(at, len, byte)),
        3 => (span.clone(), any::<bool>()).prop_map(|((at, len), unmap)| Step::Zero(at, len, unmap)),
        4 => span.prop_map(|(at, len)| Step::Read(at, len)),
        2 => Just(Step::Flush),
        1 => Just(Step::Fork),
        1 => Just(Step::Reopen),
        1 => Just(Step::Commit),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Requests, several at a time and in any order of their operations, against plain bytes.
    #[test]
    fn behaves_like_plain_bytes(
        batches in proptest::collection::vec(proptest::collection::vec(step(), 1..6), 1..12),
        alone: bool, through: bool)
    {
        let cache = if through { Cache::Writethrough } else { Cache::Writeback };
        let (block, folder) = subject(cache, 2);
        let mut bytes = folder.bytes.clone();
        let mut harness = Harness::new((block, folder));
        harness.set_alone(alone);
        harness.activate();
        let (mut forks, mut top) = (0, "top".to_owned());
        for batch in batches {
            let mut requests = Vec::new();
            // What is under way together must not meet.
            let mut touched = vec![false; (SIZE / 512) as usize];
            harness.hold_operations(true);
            for (n, step) in batch.iter().enumerate() {
                let queue = (n % 2) as u16;
                let mut free = |at: u64, len: u64| {
                    let range = at as usize..(at + len) as usize;
                    let free = touched[range.clone()].iter().all(|touched| !touched);
                    touched[range].fill(true);
                    free
                };
                let range = |at: u64, len: u64| at as usize * 512..(at + len) as usize * 512;
                let request = match *step {
                    Step::Write(at, len, byte) if free(at, len) => {
                        let data: Vec<u8> =
                            (0..len * 512).map(|n| byte.wrapping_add((n / 512) as u8)).collect();
                        bytes[range(at, len)].copy_from_slice(&data);
                        (Request::new(&mut harness, OUT, at, &data, 0), None)
                    }
                    Step::Zero(at, len, unmap) if free(at, len) => {
                        bytes[range(at, len)].fill(0);
                        let flags = if unmap { UNMAP } else { 0 };
                        let data = segment(at, len as u32, flags);
                        (Request::new(&mut harness, WRITE_ZEROES, 0, &data, 0), None)
                    }
                    Step::Read(at, len) if free(at, len) => {
                        let request =
                            Request::new(&mut harness, IN, at, &[], (len * 512) as u32);
                        (request, Some(bytes[range(at, len)].to_vec()))
                    }
                    Step::Flush => (Request::new(&mut harness, FLUSH, 0, &[], 0), None),
                    _ => continue,
                };
                harness.offer(queue, &request.0.buffers);
                requests.push(request);
            }
            harness.kick(0);
            harness.kick(1);
            harness.run();
            while harness.finish_operation() {
                harness.run();
            }
            harness.hold_operations(false);
            harness.run();
            for (request, expected) in &requests {
                prop_assert_eq!(harness.read(request.status, 1), vec![OK]);
                if let Some(expected) = expected {
                    let (gpa, len) = request.room;
                    prop_assert_eq!(&harness.read(gpa, len), expected);
                }
            }
            while harness.used(0).is_some() {}
            while harness.used(1).is_some() {}
            for step in &batch {
                match step {
                    Step::Fork if !matches!(step, Step::Read(..)) => {
                        forks += 1;
                        let name = format!("f{forks}");
                        let child = fork(&mut harness, &name, &format!("c{forks}"));
                        prop_assert_eq!(contents(child), bytes.clone());
                        if harness.device().1.path(&name).exists() {
                            top = name;
                        }
                    }
                    Step::Reopen | Step::Commit => {
                        harness.pause();
                        harness.device_mut().0.end();
                        let (_, folder) = harness.device();
                        let path = folder.path("spare");
                        let placeholder = Folder::new();
                        let spare = Overlay::open_or_create(
                            &placeholder.path("top"), &placeholder.path("base"), false, false);
                        let device = &mut harness.device_mut().0;
                        device.replace(BackEnd::Frozen(spare.unwrap().into())).unwrap();
                        let (_, folder) = harness.device();
                        if matches!(step, Step::Commit) {
                            let _ = fs::remove_file(&path);
                            flatten(&folder.path(&top), &path, &|_, _| {}).unwrap();
                            prop_assert_eq!(&fs::read(&path).unwrap(), &bytes);
                        }
                        let again = folder.open(&top);
                        harness.device_mut().0.replace(BackEnd::Frozen(again.into())).unwrap();
                        harness.resume();
                    }
                    _ => {}
                }
            }
            prop_assert_eq!(&whole(&mut harness), &bytes);
        }
        prop_assert!(Header::parse(&fs::read(harness.device().1.path("top")).unwrap(), u64::MAX).is_ok());
    }
}
