//! What a copy is told of itself by its devices.

use std::fs;
use std::path::Path;

use machine_tests::{Family, eventually};
use serde_json::Value;

use super::{fork, fork_at_work, get, kill, log, verb};

/// What the card of a guest says of itself, as soon as a line of what the guest prints has it: its address, how often
/// its configuration changed, and whether the driver is to hear of it.
fn card(printed: impl Fn() -> String) -> (String, u32, bool) {
    let last = || {
        let text = printed();
        let mut lines = text.split_inclusive('\n').rev().filter(|line| line.ends_with('\n'));
        lines.find_map(|line| Some(line.trim().strip_prefix("result net ")?.to_owned()))
    };
    eventually(|| last().is_some(), || format!("no card: {}", printed()));
    let line = last().unwrap();
    let word = |key: &str| {
        let mut words = line.split(' ').filter_map(|word| word.split_once('='));
        words.find(|(name, _)| *name == key).unwrap().1
    };
    let interrupts: u32 = word("interrupts").parse().unwrap();
    (word("mac").to_owned(), word("changes").parse().unwrap(), interrupts & 2 != 0)
}

/// The same of a child that writes to its file.
fn card_of(family: &Family, name: &str) -> (String, u32, bool) {
    card(|| fs::read_to_string(log(family, name)).unwrap())
}

#[test]
fn a_copy_has_the_address_that_it_is_given() {
    testnet::in_namespace(false, || {
        for n in 1..=4 {
            testnet::make_tap(&format!("tap{n}"), false)?;
        }
        let family = Family::default();
        let options = format!("tap={},id=e,mac=02:00:00:00:00:01", testnet::NAME);
        let guest = family.guest("m", "work dirty=2M size=64K every=100M net=1");
        let parent = Family::at_work(guest.option("--net", options).start());
        let before = ("020000000001".to_owned(), 1, false);
        assert_eq!(card(|| parent.printed()), before);

        let words = ["--net", "e=tap{n}", "--mac", "e=06:00:00:00:00:ff"];
        let children = fork_at_work(&family, "m", 2, &words);
        assert_eq!(card_of(&family, "m-1"), ("0600000000ff".to_owned(), 2, true));
        assert_eq!(card_of(&family, "m-2"), ("060000000100".to_owned(), 2, true));
        assert_eq!(card(|| parent.printed()), before);
        let config = |child: &Value| {
            let socket = child["api_sock"].as_str().unwrap();
            get(Path::new(socket), "/vm/config").unwrap()["network-interfaces"][0].clone()
        };
        assert_eq!(config(&children[1])["guest_mac"], "06:00:00:00:01:00");
        kill(&children[1]);

        // Those behind it have its own, if nobody says otherwise.
        fork_at_work(&family, "m-1", 1, &["--net", "e=tap2"]);
        assert_eq!(card_of(&family, "m-1-1"), ("0600000000ff".to_owned(), 2, true));
        let saved = family.at("saved");
        assert_eq!(verb(&family, &["snapshot", "m-1", saved.to_str().unwrap()]).code(), 0);
        for (more, address, changes) in [
            (&[][..], "0600000000ff", 2),
            (&["--mac", "e=06:00:00:00:00:07"][..], "060000000007", 3),
        ] {
            let restore = family.hull("restore").flag(saved.to_str().unwrap());
            let restore = restore.option("--net", "e=tap3").option("--name", "r");
            let restored = more.iter().fold(restore, |hull, word| hull.flag(word)).start();
            assert_eq!(card(|| restored.printed()), (address.to_owned(), changes, true));
            restored.signal(libc::SIGTERM);
            restored.finish();
        }

        for (words, reasons) in [
            (["--net=e=tap4", "--mac=e=07:00:00:00:00:01"], ["--mac", "multicast"]),
            (["--net=e=tap4", "--mac=q=06:00:00:00:00:01"], ["overrides[0].net", "the id q"]),
            (["--net=e=tap4", "--mac=e"], ["--mac", "what it gets"]),
        ] {
            let outcome = fork(&family, &[&["m"], &words[..]].concat());
            assert_eq!(outcome.code(), 1, "{words:?}: {}", outcome.stdout);
            for reason in reasons {
                assert!(outcome.stderr.contains(reason), "{reason}: {}", outcome.stderr);
            }
        }
        let restore = family.hull("restore").flag(saved.to_str().unwrap());
        restore.option("--mac", "e=x").run().misused(&["--mac", "is not a MAC address"]);
        fs::remove_dir_all(saved)?;
        Ok(())
    })
    .unwrap();
}
