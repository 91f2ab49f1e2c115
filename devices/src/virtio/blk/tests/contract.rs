//! What is asked of every device, in each way in which a disk serves requests.

use super::*;

/// Reads that the page cache answers.
mod reads {
    use super::*;

    fn probe() -> Probe<Subject> {
        Probe {
            request: |harness| Request::new(harness, IN, 7, &[], SECTOR as u32).buffers,
            check: |_, written| assert_eq!(written, SECTOR as u32 + 1),
            ..Probe::default()
        }
    }

    conformance!(disk, probe());

    mod limited {
        use super::*;

        /// With limits that only have to be asked.
        fn limited() -> Subject {
            let mut subject = disk();
            subject.0.set_limit(limiter(Some(1 << 40), Some(1 << 40)));
            subject
        }

        conformance!(limited, probe());
    }
}

/// Flushes, which are always file operations, on the second queue of two.
mod flushes {
    use super::*;

    conformance!(|| disk_with(Cache::Writeback, false, 2), flushes());
}

/// Writes, which are file operations where the file system cannot take them at once.
mod writes {
    use super::*;

    fn probe() -> Probe<Subject> {
        Probe {
            check: |harness, written| {
                assert_eq!(written, 1);
                assert_eq!(on_file(harness, 9, 1), [0xaa; SECTOR as usize]);
            },
            ..writes()
        }
    }

    conformance!(disk, probe());
}

/// An empty qcow2 image, whose requests are all calls away from the io thread.
mod on_an_image {
    use super::*;
    use crate::virtio::blk::qcow2::{self, Access, Qcow2};

    fn image(cache: Cache, queues: u16) -> Subject {
        let file = NamedTempFile::new().unwrap();
        file.as_file().write_all_at(&qcow2::tests::empty(SECTORS * SECTOR), 0).unwrap();
        let disk = Qcow2::open(file.path(), Access::default()).unwrap();
        let id = "an image".into();
        (Block::new(Options { disk: disk.into(), cache, id, queues }), file)
    }

    mod write {
        use super::*;
        conformance!(|| image(Cache::Writeback, 1), writes());
    }

    mod through {
        use super::*;
        conformance!(|| image(Cache::Writethrough, 1), writes());
    }

    mod flush {
        use super::*;
        conformance!(|| image(Cache::Writeback, 2), flushes());
    }

    #[test]
    fn requests_are_calls_and_are_counted() {
        let mut harness = started(image(Cache::Writeback, 1));
        let request = begin(&mut harness, OUT, 9, &[0xaa; SECTOR as usize], 0);
        assert!(matches!(harness.oldest_operation().unwrap().action, Action::Call(_)));
        assert_eq!(answer_to(&mut harness, &request), None);
        harness.finish_operation();
        assert_eq!(answer_to(&mut harness, &request), Some(only_status(OK)));
        harness.hold_operations(false);
        let read = ask(&mut harness, IN, 9, &[], SECTOR as u32);
        assert_eq!((read.status, &read.data[..]), (OK, &[0xaa; SECTOR as usize][..]));
        let discard = segment(8, 4, 0);
        assert_eq!(ask(&mut harness, DISCARD, 0, &discard, 0), only_status(OK));
        assert_eq!(ask(&mut harness, FLUSH, 0, &[], 0), only_status(OK));
        let metrics = harness.device().0.metrics.clone();
        assert_eq!((metrics.read_count.get(), metrics.write_count.get()), (1, 1));
        assert_eq!((metrics.range_count.get(), metrics.flush_count.get()), (1, 1));
    }
}
