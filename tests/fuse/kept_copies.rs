//! Further copies of the cached blocks of a base, in pools: what a reader gets when a drive fails or is away.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::devices::{LoopDevice, Volume};
use crate::failing::{BadDisk, drop_caches};
use crate::harness::{TestDaemon, open, read_at, same, until};
use crate::server::{Object, Server};

const MIB: usize = 1 << 20;
const LEN: usize = 6 * MIB + 5000;
const EXT4: &[&str] = &["mkfs.ext4", "-q", "-F", "-O", "^has_journal"];

fn add_pool(daemon: &TestDaemon, name: &str) -> PathBuf {
    let dir = daemon.path(name);
    daemon.ok(&["pool", "add", name, dir.to_str().unwrap()]);
    dir
}

fn base(daemon: &TestDaemon) -> Value {
    daemon.json(&["base", "show", "b"])
}

/// Waits until a pool has a copy of all of the base.
fn wait_until_copied(daemon: &TestDaemon, pool: &str) {
    until("the copy", || {
        let shown = base(daemon);
        let copies = shown["further_copies"].as_array()?;
        let copy = copies.iter().find(|copy| copy["pool"] == pool)?;
        (copy["current"] == true && copy["bytes"] == LEN && copy["error"].is_null()).then_some(())
    });
}

/// A base of a server with all of it in the cache and in a copy, and a disk on it. The server is gone afterwards.
fn hydrated_with_copies(daemon: &TestDaemon, copies: &str) -> Vec<u8> {
    let server = Server::start(Object::new(LEN));
    let bytes = server.object().bytes.to_vec();
    daemon.ok(&["base", "add", "b", &server.url("/b")]);
    daemon.ok(&["disk", "create", "vm", "--base", "b"]);
    daemon.ok(&["base", "pin", "b", "--copies", copies]);
    daemon.ok(&["base", "hydrate", "b"]);
    bytes
}

/// The files with blocks in a directory of the cache.
fn block_files(cache: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(cache) else { return Vec::new() };
    let paths = entries.map(|entry| entry.unwrap().path());
    paths.filter(|path| path.extension().is_some_and(|end| end == "blocks")).collect()
}

fn damage(file: &Path) {
    let file = fs::File::options().write(true).open(file).unwrap();
    file.write_all_at(&vec![0xDD; LEN], 0).unwrap();
    file.sync_all().unwrap();
}

/// Guards D101.
#[test]
fn a_cache_drive_that_fails_is_read_from_its_copy_and_heals() {
    let mut daemon = TestDaemon::on_disk();
    daemon.stop();
    let drive = daemon.path("drive");
    fs::create_dir(&drive).unwrap();
    let Some(bad) = BadDisk::new(&drive, 64 << 20) else { return };
    let cache = daemon.store().join("cache");
    let volume = Volume::new(LoopDevice::new(&bad.file()), cache.clone(), EXT4, "errors=continue");
    daemon.start();
    add_pool(&daemon, "spare");
    let bytes = hydrated_with_copies(&daemon, "2");
    wait_until_copied(&daemon, "spare");
    daemon.stop();
    drop_caches();
    daemon.start();
    until("the cache", || (base(&daemon)["complete"] == true).then_some(()));
    drop_caches();
    bad.fails();
    let disk = open(&daemon.disk("vm"));
    same(&read_at(&disk, 0, LEN), &bytes, "with a cache drive that fails, and no server");
    let shown = base(&daemon);
    assert_eq!(shown["state"], "ok", "{shown}");
    // The next worker has neither the drive nor the server.
    daemon.kill_worker();
    same(&read_at(&disk, 0, LEN), &bytes, "under the next worker");
    bad.works();
    until("the cache has all of it again", || (base(&daemon)["complete"] == true).then_some(()));
    drop(disk);
    daemon.stop();
    drop(volume);
}

/// Guards D101.
#[test]
fn blocks_that_the_cache_lost_come_back_from_a_copy_without_the_server() {
    let mut daemon = TestDaemon::on_disk();
    add_pool(&daemon, "spare");
    let bytes = hydrated_with_copies(&daemon, "2");
    wait_until_copied(&daemon, "spare");
    daemon.stop();
    let cache = daemon.store().join("cache");
    block_files(&cache).iter().for_each(|file| damage(file));
    daemon.start();
    same(&read_at(&open(&daemon.disk("vm")), 0, LEN), &bytes, "from the copy");
    // Damage that no read has met is found by the check. The copy has those blocks too.
    daemon.stop();
    daemon.ok(&["check", "--verify-bases", "--repair"]);
    daemon.start();
    until("the cache has all of it again", || (base(&daemon)["complete"] == true).then_some(()));
    // Now the copy is damaged, and heals from the cache.
    daemon.stop();
    daemon.ok(&["check", "--verify-bases"]);
    let copies = block_files(&daemon.path("spare/cache"));
    assert_eq!(copies.len(), 1);
    copies.iter().for_each(|file| damage(file));
    let found = daemon.cli(&["check", "--verify-bases"]);
    let said = String::from_utf8_lossy(&found.stdout).into_owned();
    assert!(!found.status.success() && said.contains("spare/cache/"), "{said}");
    daemon.ok(&["check", "--verify-bases", "--repair"]);
    daemon.start();
    wait_until_copied(&daemon, "spare");
    same(&read_at(&open(&daemon.disk("vm")), 0, LEN), &bytes, "from the cache");
    daemon.stop();
    daemon.ok(&["check", "--verify-bases"]);
}

/// Guards D102.
#[test]
fn a_copy_on_a_drive_that_was_away_while_the_base_was_evicted_brings_nothing_back() {
    let mut daemon = TestDaemon::on_disk();
    let drive = daemon.path("drive");
    fs::create_dir(&drive).unwrap();
    let volume = Volume::on_file(&drive, 512 << 20, EXT4);
    daemon.ok(&["pool", "add", "away", volume.path("").to_str().unwrap()]);
    hydrated_with_copies(&daemon, "2");
    wait_until_copied(&daemon, "away");
    daemon.stop();
    let old = block_files(&volume.path("cache"));
    assert_eq!(old.len(), 1);
    volume.unmount();
    daemon.start();
    assert_eq!(base(&daemon)["further_copies"], json!([]));
    daemon.ok(&["base", "evict", "b", "--force"]);
    assert_eq!(base(&daemon)["cached_bytes"], 0);
    volume.mount();
    daemon.ok(&["pool", "attach", "away"]);
    // The copy of today has no block, and another file.
    until("the old copy goes", || (!old[0].exists()).then_some(()));
    assert_eq!(base(&daemon)["cached_bytes"], 0);
    daemon.stop();
    daemon.ok(&["check", "--verify-bases"]);
}

#[test]
fn copies_go_to_as_many_pools_as_asked_for_and_away_when_the_base_is_unpinned() {
    let mut daemon = TestDaemon::on_disk();
    let refused = |args: &[&str], why: &str| {
        let error = daemon.fails(&[&["base", "pin", "b", "--copies"], args].concat());
        assert!(error.contains(why), "{args:?}: {error}");
    };
    let server = Server::start(Object::new(LEN));
    daemon.ok(&["base", "add", "b", &server.url("/b")]);
    refused(&["2"], "2 copies need 1 pools besides the store, and it has 0");
    refused(&["9"], "9");
    refused(&["2", "--off"], "--off");
    let dirs: Vec<PathBuf> = ["one", "two", "three"].map(|name| add_pool(&daemon, name)).into();
    let with_files = |count: usize| {
        until("the copies", || {
            let have: Vec<_> =
                dirs.iter().filter(|dir| !block_files(&dir.join("cache")).is_empty()).collect();
            (have.len() == count).then(|| have.into_iter().cloned().collect::<Vec<PathBuf>>())
        })
    };
    daemon.ok(&["base", "pin", "b", "--copies", "3"]);
    daemon.ok(&["base", "hydrate", "b"]);
    let two = with_files(2);
    let name = |dir: &PathBuf| dir.file_name().unwrap().to_str().unwrap().to_owned();
    two.iter().for_each(|dir| wait_until_copied(&daemon, &name(dir)));
    assert!(daemon.ok(&["base", "show", "b"]).contains(&format!("{}: ", name(&two[0]))));
    // A pool that is removed gets a successor, and keeps nothing.
    daemon.ok(&["pool", "rm", &name(&two[0])]);
    until("the files of the removed pool", || block_files(&two[0].join("cache")).is_empty().then_some(()));
    let again = with_files(2);
    assert!(!again.contains(&two[0]));
    again.iter().for_each(|dir| wait_until_copied(&daemon, &name(dir)));
    daemon.ok(&["base", "pin", "b", "--copies", "2"]);
    with_files(1);
    assert_eq!(base(&daemon)["copies"], 2);
    daemon.ok(&["base", "pin", "b"]);
    assert_eq!(base(&daemon)["copies"], 2, "as many as before");
    daemon.restart();
    with_files(1);
    daemon.ok(&["base", "pin", "b", "--off"]);
    with_files(0);
    assert_eq!((&base(&daemon)["copies"], &base(&daemon)["further_copies"]), (&json!(1), &json!([])));
    daemon.stop();
    daemon.ok(&["check", "--verify-bases"]);
}
