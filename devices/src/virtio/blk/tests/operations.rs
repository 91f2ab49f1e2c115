//! Operations on the file: who does them, in which order they end, and how they fail.

use super::*;

#[test]
fn a_disk_alone_on_its_thread_writes_and_flushes_there() {
    let mut harness = started(disk());
    harness.set_alone(true);
    // The first may find out that the file system wants a thread that can wait.
    let write = begin(&mut harness, OUT, 2, &[0x5a; SECTOR as usize], 0);
    harness.finish_operation();
    assert_eq!(answer_to(&mut harness, &write), Some(only_status(OK)));
    let write = begin(&mut harness, OUT, 3, &[0x5a; SECTOR as usize], 0);
    assert_eq!(harness.operations(), 0);
    assert_eq!(answer_to(&mut harness, &write), Some(only_status(OK)));
    assert_eq!(on_file(&harness, 3, 1), [0x5a; SECTOR as usize]);
    // The write may have been slow, which makes the flush an operation.
    let flush = begin(&mut harness, FLUSH, 0, &[], 0);
    harness.finish_operation();
    assert_eq!(answer_to(&mut harness, &flush), Some(only_status(OK)));
}

#[test]
fn reads_that_wait_together_are_submitted_together() {
    let mut harness = started(disk());
    harness.hold_operations(true);
    let requests: Vec<Request> = (0..20)
        .map(|sector| {
            let request = Request::new(&mut harness, IN, sector, &[], SECTOR as u32);
            harness.offer(0, &request.buffers);
            request
        })
        .collect();
    harness.kick(0);
    harness.run();
    assert_eq!(harness.operations(), requests.len());
    harness.hold_operations(false);
    harness.run();
    assert_eq!(harness.operations(), 0);
    for (sector, request) in requests.iter().enumerate() {
        let answer = answer_to(&mut harness, request).unwrap();
        assert_eq!(answer.status, OK);
        assert_eq!(answer.data, on_file(&harness, sector as u64, 1));
    }
}

#[test]
fn a_read_that_comes_in_pieces_goes_on_where_it_was() {
    let mut harness = started(disk());
    let bytes = on_file(&harness, 0, 4);
    let file = harness.device().1.reopen().unwrap();
    // What the file has not got cannot be read: each step finds one more sector.
    file.set_len(SECTOR).unwrap();
    let request = begin(&mut harness, IN, 0, &[], 4 * 512);
    for sector in 1..4 {
        assert_eq!(answer_to(&mut harness, &request), None);
        assert_eq!(harness.oldest_operation().unwrap().offset, sector * SECTOR);
        // Neither an interrupted call nor a busy one is an error.
        harness.fail_operation(if sector == 1 { libc::EINTR } else { libc::EAGAIN });
        assert_eq!(harness.oldest_operation().unwrap().offset, sector * SECTOR);
        let range = sector as usize * 512..(sector as usize + 1) * 512;
        file.write_all_at(&bytes[range], sector * SECTOR).unwrap();
        harness.finish_operation();
    }
    let expected = Answer { status: OK, written: 4 * 512 + 1, data: bytes };
    assert_eq!(answer_to(&mut harness, &request), Some(expected));
    assert_eq!(harness.operations(), 0);
}

#[test]
fn a_read_past_the_end_of_a_file_that_shrank_is_an_error() {
    let mut harness = started(disk());
    harness.device().1.as_file().set_len(SECTOR).unwrap();
    let answer = ask(&mut harness, IN, 0, &[], 1024);
    assert_eq!((answer.status, answer.written), (IO_ERROR, 513), "one sector came");
    assert_eq!(answer.data[..512], [fill(0); 512]);
    assert_eq!(ask(&mut harness, IN, 8, &[], 512).status, IO_ERROR);
    assert_eq!(ask(&mut harness, IN, 0, &[], 512).status, OK, "the disk goes on");
}

#[test]
fn an_error_of_the_file_is_an_error_of_the_request() {
    let mut harness = started(disk_with(Cache::Writethrough, false, 1));
    let request = begin(&mut harness, OUT, 0, &[9; 512], 0);
    harness.fail_operation(libc::ENOSPC);
    assert_eq!(answer_to(&mut harness, &request), Some(only_status(IO_ERROR)));
    let request = begin(&mut harness, OUT, 0, &[9; 512], 0);
    harness.fail_operation(libc::EAGAIN);
    assert_eq!(answer_to(&mut harness, &request), None);
    harness.finish_operation();
    assert_eq!(answer_to(&mut harness, &request), Some(only_status(OK)));
    assert!(harness.take_fault().is_none());
}

#[test]
fn each_queue_serves_its_own_requests() {
    let mut harness = started(disk_with(Cache::Writeback, false, 4));
    for queue in (0..4).rev() {
        let bytes = [0x40 + queue as u8; 512];
        let write = ask_queue(&mut harness, queue, (OUT, u64::from(queue)), &bytes, 0);
        assert_eq!(write, only_status(OK));
    }
    for queue in 0..4 {
        let sector = 3 - u64::from(queue);
        let answer = ask_queue(&mut harness, queue, (IN, sector), &[], 512);
        assert_eq!(answer.data, [0x40 + sector as u8; 512]);
    }
    // What one of them waits for holds up none of the others.
    harness.hold_operations(true);
    let slow = Request::new(&mut harness, FLUSH, 0, &[], 0);
    harness.offer(0, &slow.buffers);
    harness.kick(0);
    harness.run();
    assert_eq!(ask_queue(&mut harness, 1, (IN, 0), &[], 512).data, [0x40; 512]);
    assert_eq!(harness.used(0), None);
}

#[test]
fn requests_may_overtake_each_other() {
    let mut harness = started(disk());
    let slow = begin(&mut harness, FLUSH, 0, &[], 0);
    let fast = Request::new(&mut harness, GET_ID, 0, &[], 20);
    let fast_head = harness.offer(0, &fast.buffers);
    harness.kick(0);
    harness.run();
    assert_eq!(harness.used(0), Some((fast_head, 21)));
    harness.finish_operation();
    assert_eq!(answer_to(&mut harness, &slow), Some(only_status(OK)));
}
