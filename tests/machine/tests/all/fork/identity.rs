//! What a copy is told of itself by its devices.

use std::fs;
use std::path::Path;

use machine_tests::{Family, Running, eventually, wait_in_file};
use serde_json::Value;

use super::{children, fork, fork_at_work, get, kill, log, verb};

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

/// A guest that asks its metadata service who it is, again and again, and says when that changes.
fn who(family: &Family, name: &str, mmds: &str) -> Running {
    let ask = "GET%20/who%20HTTP/1.0%0d%0a%0d%0a";
    let guest = family.guest(name, &format!("mmds wait=1 request={}", [ask; 3].join("|")));
    guest
        .option("--net", format!("tap={},id=e,mac=02:00:00:00:00:01", testnet::NAME))
        .option("--mmds", mmds)
        .start()
}

#[test]
fn a_copy_is_told_by_its_metadata_service_who_it_is() {
    testnet::in_namespace(false, || {
        for n in 1..=4 {
            testnet::make_tap(&format!("tap{n}"), false)?;
        }
        let family = Family::default();
        let file = |name: &str, contents: &str| {
            fs::write(family.at(name), contents).unwrap();
            family.at(name).display().to_string()
        };
        let parent = who(&family, "m", &file("parent", r#"{"who": "parent"}"#));
        parent.wait_for("parent\nend of answer");
        for n in 1..=2 {
            file(&format!("of-{n}"), &format!(r#"{{"who": "copy {n}"}}"#));
        }
        let at = |name: &str| family.at(name).display().to_string();
        let words = |more: &[&str]| {
            let console = at("m-{n}.log");
            let words = ["m", "--json", "--net", "e=tap{n}", "--console-file", &console];
            fork(&family, &[&words[..], more].concat())
        };
        let outcome = words(&["-n", "2", "--name", "m-{n}", "--metadata", &at("of-{n}")]);
        let told = children(&outcome);
        assert_eq!(outcome.code(), 0, "{}", outcome.stderr);
        for (n, child) in (1..).zip(&told) {
            let found = format!("copy {n}\nend of answer");
            wait_in_file(&log(&family, &format!("m-{n}")), 0, &found);
            let socket = child["api_sock"].as_str().unwrap();
            let metadata = get(Path::new(socket), "/mmds").unwrap();
            assert_eq!(metadata["who"], format!("copy {n}"));
        }
        // What the parent finds is not for others.
        told.iter().for_each(kill);
        fs::remove_file(log(&family, "m-1"))?;
        let untold = children(&words(&["--name", "m-{n}"]));
        wait_in_file(&log(&family, "m-1"), 0, "not found: /who");
        assert!(!fs::read_to_string(log(&family, "m-1"))?.contains("parent"));
        untold.iter().for_each(kill);

        let saved = at("saved");
        assert_eq!(verb(&family, &["snapshot", "m", &saved]).code(), 0);
        let restored = |more: &[&str]| {
            let restore = family.hull("restore").flag(&saved).option("--net", "e=tap3");
            more.iter().fold(restore.option("--name", "r"), |hull, word| hull.flag(word))
        };
        let other = restored(&["--metadata", &at("of-2")]).start();
        other.wait_for("copy 2\nend of answer");
        assert_eq!(get(&family.at("hull/r.sock"), "/mmds").unwrap()["who"], "copy 2");
        other.signal(libc::SIGTERM);
        other.finish();
        fs::remove_file(at("parent"))?;
        let outcome = restored(&[]).run();
        assert!(
            outcome.code() == 1 && outcome.stderr.contains("parent: No such file"),
            "{outcome:?}"
        );

        let long = file("long", &format!("\"{}\"", "x".repeat(1 << 20)));
        for (metadata, reason) in [
            ("/nowhere", "/nowhere: No such file"),
            (&*file("odd", "{"), "odd: EOF"),
            (&*file("list", "[]"), "list: it has no JSON object"),
            (&*long, "it is longer than 1 MiB"),
        ] {
            let outcome = words(&["--metadata", metadata]);
            assert_eq!(outcome.code(), 1, "{}", outcome.stdout);
            assert!(outcome.stderr.contains(reason), "{reason}: {}", outcome.stderr);
        }
        // As much as there may be goes through.
        let most = format!(r#"{{"who":"{}"}}"#, "x".repeat((1 << 20) - 10));
        let most = children(&words(&["--name", "most", "--metadata", &file("most", &most)]));
        assert!(most[0]["pid"].is_u64(), "{most:?}");
        parent.signal(libc::SIGTERM);
        parent.finish();

        let _plain = family.parent("plain");
        let outcome = fork(&family, &["plain", "--metadata", &at("of-1")]);
        let reason = "overrides[0].metadata: the machine has no metadata service";
        assert!(outcome.code() == 1 && outcome.stderr.contains(reason), "{}", outcome.stderr);
        assert_eq!(verb(&family, &["snapshot", "plain", &at("other")]).code(), 0);
        let restore = family.hull("restore").flag(&at("other")).option("--metadata", at("of-1"));
        restore.run().misused(&["the machine has no metadata service"]);
        Ok(())
    })
    .unwrap();
}

#[test]
fn the_hook_is_told_the_address_of_the_card() {
    testnet::in_namespace(false, || {
        for n in 1..=3 {
            testnet::make_tap(&format!("tap{n}"), false)?;
        }
        let family = Family::default();
        let guest = family.guest("m", "vsock op=listen port=1024 mode=hook conns=9");
        let card = format!("tap={},id=e,mac=02:00:00:00:00:01", testnet::NAME);
        let socket = family.at("v");
        let guest = guest.option("--net", card).option("--vsock", &socket);
        let parent = guest.start();
        parent.wait_for("ready");
        let at = |name: &str| family.at(name).display().to_string();
        let told = |text: String| {
            let line = text.lines().find(|line| line.starts_with("{\"hull\"")).unwrap();
            serde_json::from_str::<Value>(line).unwrap()["resumed"].clone()
        };
        let console = at("m-{n}.log");
        let words = [
            ["-n=2", "--json", "--hook", "--hostname=w-{n}", "--name=m-{n}"],
            [
                "--net=e=tap{n}",
                "--mac=e=06:00:00:00:00:0f",
                "--ip=e=10.0.{n}.2/24",
                "--console-file",
                &console,
            ],
        ];
        let outcome = fork(&family, &[&["m"][..], &words[0], &words[1][..]].concat());
        let copies = children(&outcome);
        assert_eq!(outcome.code(), 0, "{}", outcome.stderr);
        for (n, child) in (1..).zip(&copies) {
            assert_eq!(child["ready"], true, "{child}");
            let told = told(wait_in_file(&log(&family, &format!("m-{n}")), 0, "}}\n"));
            assert_eq!(told["hostname"], format!("w-{n}"));
            let mac = format!("06:00:00:00:00:{:02x}", 0x0e + n);
            assert_eq!(told["net"][0]["ip"], format!("10.0.{n}.2/24"));
            assert_eq!(told["net"][1]["mac"], mac);
            let api = child["api_sock"].as_str().unwrap();
            let config = get(Path::new(api), "/vm/config").unwrap();
            assert_eq!(config["network-interfaces"][0]["guest_mac"], mac);
        }
        let saved = at("saved");
        assert_eq!(verb(&family, &["snapshot", "m", &saved]).code(), 0);
        let restore = family.hull("restore").flag(&saved).option("--net", "e=tap3");
        let restore = restore.option("--vsock", family.at("r")).flag("--hook");
        let restore = restore.option("--ip", "e=10.0.9.2/24,10.0.9.1");
        let restored = restore.option("--mac", "e=06:00:00:00:00:07").start();
        restored.wait_for("}}\n");
        let told = told(restored.printed());
        assert_eq!((&told["clone"], &told["of"]), (&1.into(), &1.into()));
        assert_eq!(told["net"][0]["gateway"], "10.0.9.1");
        assert_eq!(told["net"][1]["mac"], "06:00:00:00:00:07");
        for (option, value, reason) in [
            ("--ip", "e", "the device's id"),
            ("--ip", "e=10.0.9.2", "is not an address with a prefix"),
            ("--ip", "e=10.0.9.2/24,x", "is no address"),
            ("--ip", "q=10.0.9.2/24", "no network card q"),
            ("--hook-timeout", "nan", "no time"),
            ("--hook-timeout", "601", "not between 1 and 600000"),
        ] {
            let restore = family.hull("restore").flag(&saved).flag("--hook");
            restore.flag(&format!("{option}={value}")).run().misused(&[reason]);
        }
        Ok(())
    })
    .unwrap();
}
