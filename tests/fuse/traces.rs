//! Traces of boots: recording through the mount, export and import.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::harness::{Random, TestDaemon, open, read_at, same, until};

const MIB: u64 = 1 << 20;

/// A daemon whose recordings end a second after the last new read.
fn quick() -> TestDaemon {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let config = daemon.path("config.toml");
    fs::write(&config, "[trace]\nidle_seconds = 1\n").unwrap();
    daemon.try_start(&["--config", config.to_str().unwrap()]).unwrap();
    daemon
}

/// Reads like a boot: small pieces from the whole disk. Returns the number of bytes.
fn boot(disk: &Path, size: u64) -> u64 {
    let file = open(disk);
    let mut blocks: Vec<u64> = (0..size / 4096).collect();
    let mut random = Random(5);
    for n in 0..400 {
        let at = n + random.below((blocks.len() - n) as u64) as usize;
        blocks.swap(n, at);
        read_at(&file, blocks[n] * 4096, 4096);
    }
    400 * 4096
}

fn traces(daemon: &TestDaemon) -> Vec<Value> {
    daemon.json(&["base", "trace", "ls"]).as_array().unwrap().clone()
}

#[test]
fn the_first_boot_of_a_base_is_recorded_and_can_be_exported_and_imported() {
    let mut daemon = quick();
    let data = daemon.base(16 * MIB as usize);
    let (one, two) = (daemon.create("one", true, 16 * MIB), daemon.create("two", true, 20 * MIB));
    // A look at the partition table is no boot.
    read_at(&open(&one), 0, 65536);
    let bytes = boot(&two, 16 * MIB);
    until("a trace", || (!traces(&daemon).is_empty()).then_some(()));
    let shown = daemon.json(&["base", "trace", "show", "b"]);
    assert_eq!((shown["bytes"].as_u64(), shown["size"].as_u64()), (Some(bytes), Some(16 * MIB)));
    assert!(shown["file_bytes"].as_u64() < Some(4096) && shown["fits"] == true, "{shown}");
    assert!(
        shown["entries"].as_u64() <= Some(400) && shown["prefetch_ranges"].as_u64() < Some(400),
        "{shown}"
    );
    let events = daemon.json(&["events"]);
    let told = events.as_array().unwrap().iter().find(|e| e["event"] == "trace.recorded").unwrap();
    assert_eq!((told["base"].as_str(), told["bytes"].as_u64()), (Some("b"), Some(bytes)));
    // The second boot reads other things, and is not recorded.
    same(&read_at(&open(&one), 0, data.len()), &data, "one");
    let file = daemon.path("b.trace");
    let path = file.to_str().unwrap();
    daemon.ok(&["base", "trace", "export", "b", path]);
    let exported = fs::read(&file).unwrap();
    assert_eq!(exported, fs::read(daemon.store().join("traces/1.trace")).unwrap());
    daemon.restart();
    assert_eq!(daemon.json(&["base", "trace", "show", "b"])["bytes"].as_u64(), Some(bytes));
    daemon.ok(&["base", "trace", "rm", "b"]);
    assert!(daemon.fails(&["base", "trace", "show", "b"]).contains("plyfs base trace ls"));
    assert!(daemon.fails(&["base", "trace", "rm", "b"]).contains("trace of base b"));
    daemon.ok(&["base", "trace", "import", "b", path]);
    assert_eq!(daemon.json(&["base", "trace", "show", "b"])["bytes"].as_u64(), Some(bytes));

    // A damaged trace, and a trace of another image.
    let mut damaged = exported.clone();
    damaged[60] ^= 1;
    fs::write(daemon.path("damaged"), damaged).unwrap();
    let said = daemon.fails(&["base", "trace", "import", "b", daemon.path("damaged").to_str().unwrap()]);
    assert!(said.contains("checksum"), "{said}");
    fs::write(daemon.path("other.img"), vec![1; 5000]).unwrap();
    daemon.ok(&["base", "add", "other", daemon.path("other.img").to_str().unwrap()]);
    let said = daemon.fails(&["base", "trace", "import", "other", path]);
    assert!(said.contains("16777216") && said.contains("5000"), "{said}");
    assert!(daemon.fails(&["base", "trace", "import", "none", path]).contains("no base of that name"));
    assert!(daemon.fails(&["base", "trace", "import", "b", "/no/file"]).contains("/no/file"));
    for foreign in ["/etc/passwd", "/dev/null"] {
        let said = daemon.fails(&["base", "trace", "import", "b", foreign]);
        assert!(said.contains("is no trace") && said.contains("plyfs base trace export"), "{said}");
    }
    assert_eq!(daemon.json(&["base", "trace", "show", "b"])["bytes"].as_u64(), Some(bytes));

    // Removing the base removes its trace.
    daemon.ok(&["disk", "rm", "one", "two"]);
    daemon.ok(&["base", "rm", "b"]);
    assert!(traces(&daemon).is_empty());
    assert_eq!(fs::read_dir(daemon.store().join("traces")).unwrap().count(), 0);
    daemon.stop();
    daemon.ok(&["check"]);
}

#[test]
fn a_requested_recording_contains_the_reads_of_one_disk() {
    let mut daemon = TestDaemon::on_disk();
    daemon.base(4 * MIB as usize);
    let (one, two) = (daemon.create("one", true, 4 * MIB), daemon.create("two", true, 4 * MIB));
    daemon.create("blank", false, MIB);
    assert!(daemon.fails(&["trace", "record", "blank"]).contains("it has no base"));
    assert!(daemon.fails(&["trace", "record", "none"]).contains("no disk of that name"));
    assert!(daemon.fails(&["trace", "record", "one", "--stop"]).contains("not being recorded"));
    daemon.ok(&["trace", "record", "one"]);
    assert!(daemon.fails(&["trace", "record", "two"]).contains("under way"));
    assert!(daemon.fails(&["trace", "record", "one", "--stop"]).contains("nothing was read"));
    daemon.ok(&["trace", "record", "one"]);
    // The recording contains the blocks that are read from the base, cached or not.
    std::os::unix::fs::FileExt::write_all_at(&open(&one), &[1; 4096], 8192).unwrap();
    for _ in 0..2 {
        read_at(&open(&one), 0, 5 * 4096);
        read_at(&open(&two), MIB, 4096);
    }
    std::os::unix::fs::FileExt::write_all_at(&open(&one), &[1; 100], 2 * MIB + 100).unwrap();
    let trace = daemon.json(&["trace", "record", "one", "--stop"]);
    // Blocks 0, 1, 3 and 4, and the one that was copied up.
    assert_eq!(trace["bytes"].as_u64(), Some(5 * 4096), "{trace}");
    assert_eq!(trace["disk"], "one");

    // A stop of the daemon saves a recording that is under way.
    daemon.ok(&["trace", "record", "two"]);
    read_at(&open(&two), MIB, 8192);
    daemon.restart();
    assert_eq!(daemon.json(&["base", "trace", "show", "b"])["bytes"].as_u64(), Some(8192));
    daemon.stop();
    daemon.ok(&["check"]);
}

/// Guards D23.
#[test]
fn a_damaged_trace_affects_no_read() {
    let mut daemon = TestDaemon::on_disk();
    let data = daemon.base(4 * MIB as usize);
    let one = daemon.create("one", true, 4 * MIB);
    daemon.ok(&["trace", "record", "one"]);
    read_at(&open(&one), MIB, 8192);
    daemon.ok(&["trace", "record", "one", "--stop"]);
    daemon.stop();
    let file = daemon.store().join("traces/1.trace");
    let mut bytes = fs::read(&file).unwrap();
    bytes[50] ^= 4;
    fs::write(&file, &bytes).unwrap();
    fs::write(daemon.store().join("traces/77.trace"), &bytes).unwrap();
    fs::write(daemon.store().join("traces/1.trace.tmp"), b"half").unwrap();
    daemon.start();
    same(&read_at(&open(&one), 0, data.len()), &data, "one");
    let list = traces(&daemon);
    assert!(list.len() == 1 && list[0]["error"].as_str().unwrap().contains("checksum"), "{list:?}");
    assert!(daemon.fails(&["base", "trace", "export", "b", "/dev/null"]).contains("checksum"));
    assert!(!daemon.store().join("traces/77.trace").exists(), "the trace of no base");
    daemon.stop();
    let found = daemon.cli(&["check"]);
    let text = String::from_utf8(found.stdout).unwrap();
    assert!(
        !found.status.success() && text.contains("traces/1.trace") && text.contains("1.trace.tmp"),
        "{text}"
    );
    daemon.ok(&["check", "--repair"]);
    daemon.ok(&["check"]);
    assert_eq!(fs::read_dir(daemon.store().join("traces")).unwrap().count(), 0);
}
