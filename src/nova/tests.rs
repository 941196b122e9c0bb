//! The cache of images of a made-up host, and the formats that are refused.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::contents::{HEAD, refusal};
use super::overlays::backing_of;
use super::{Entry, Instances, cache_name};

const IMAGE: &str = "0f3b1c1e-7b0a-4f3e-9d63-0c6d6a5a1f10";
const NOW: Duration = Duration::ZERO;

fn host() -> (tempfile::TempDir, Instances) {
    let dir = tempfile::tempdir().unwrap();
    let instances = Instances::open(dir.path()).unwrap();
    (dir, instances)
}

/// The header of a qcow2 file on top of `backing`.
fn qcow2(backing: &[u8]) -> Vec<u8> {
    let mut head = b"QFI\xfb\0\0\0\x03".to_vec();
    head.extend(if backing.is_empty() { 0u64 } else { 104 }.to_be_bytes());
    head.extend((backing.len() as u32).to_be_bytes());
    head.resize(104, 0);
    head.extend(backing);
    head.resize(65536, 0);
    head
}

#[test]
fn an_image_has_the_name_that_nova_gives_it() {
    // As hashlib.sha1 of Python, which Nova uses.
    assert_eq!(cache_name(""), "da39a3ee5e6b4b0d3255bfef95601890afd80709");
    assert_eq!(cache_name("abc"), "a9993e364706816aba3e25717850c26c9cd0d89d");
    let (_dir, instances) = host();
    let place = instances.place_of(IMAGE);
    assert_eq!(place, instances.dir().join("_base").join(cache_name(IMAGE)));
    assert!(Instances::open(&place).is_err());
}

/// Guards D110.
#[test]
fn only_links_to_bases_are_made_replaced_and_removed() {
    let (dir, instances) = host();
    let target = Path::new("/var/lib/plyfs/mnt/bases/g-1.raw");
    let lock = instances.lock(IMAGE, NOW).unwrap().unwrap();
    assert_eq!(instances.entry(IMAGE).unwrap(), Entry::Absent);
    assert!(!instances.unlink(&lock, IMAGE, target).unwrap());
    let linked = Entry::Link(target.to_owned());
    // What a pass that was killed has left.
    let leftover = dir.path().join("_base").join(format!(".{}.plyfs", cache_name(IMAGE)));
    fs::create_dir(dir.path().join("_base")).unwrap();
    symlink("/nowhere", &leftover).unwrap();
    for _ in 0..2 {
        assert_eq!(instances.link(&lock, IMAGE, target).unwrap(), linked);
        assert_eq!(instances.entry(IMAGE).unwrap(), linked);
    }
    assert!(!leftover.is_symlink());
    assert_eq!(instances.links(target.parent().unwrap()).unwrap(), [(cache_name(IMAGE), target.to_owned())]);
    // The mount has moved.
    let moved = Path::new("/srv/mnt/bases/g-1.raw");
    assert_eq!(instances.link(&lock, IMAGE, moved).unwrap(), Entry::Link(moved.to_owned()));
    assert!(!instances.unlink(&lock, IMAGE, target).unwrap(), "it is not that link");
    assert!(instances.unlink(&lock, IMAGE, moved).unwrap());
    // A link that an operator made, and a file that Nova downloaded.
    let place = instances.place_of(IMAGE);
    symlink("/images/golden.raw", &place).unwrap();
    let other = Entry::Link(PathBuf::from("/images/golden.raw"));
    assert_eq!(instances.link(&lock, IMAGE, target).unwrap(), other);
    assert!(!instances.unlink(&lock, IMAGE, target).unwrap());
    assert_eq!(instances.entry(IMAGE).unwrap(), other);
    fs::remove_file(&place).unwrap();
    fs::write(&place, "downloaded").unwrap();
    assert_eq!(instances.link(&lock, IMAGE, target).unwrap(), Entry::File);
    assert!(!instances.unlink(&lock, IMAGE, target).unwrap());
    assert_eq!(fs::read(&place).unwrap(), b"downloaded");
}

/// Guards D110.
#[test]
fn the_lock_is_the_one_that_nova_takes() {
    let (dir, instances) = host();
    let file = dir.path().join("locks").join(format!("nova-{}", cache_name(IMAGE)));
    let lock = instances.lock(IMAGE, NOW).unwrap().unwrap();
    assert!(file.is_file());
    assert!(instances.lock(IMAGE, NOW).unwrap().is_none(), "it is held");
    assert!(instances.lock("other", NOW).unwrap().is_some(), "another image has another lock");
    // As fasteners takes it: a record lock of a process.
    let script = "import fcntl,sys\n\
                  try: fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)\n\
                  except OSError: sys.exit(7)";
    let python = || Command::new("python3").args(["-c", script]).arg(&file).status().unwrap().code();
    assert_eq!(python(), Some(7), "Nova waits for it");
    drop(lock);
    assert_eq!(python(), Some(0), "Nova gets it");
    // The manager of Nova's cache removes the file of a lock that another process waits for.
    let old = instances.lock(IMAGE, NOW).unwrap().unwrap();
    fs::remove_file(&file).unwrap();
    let new = instances.lock(IMAGE, NOW).unwrap().unwrap();
    assert!(file.is_file());
    drop((old, new));
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    assert!(instances.lock(IMAGE, NOW).is_err());
    fs::remove_dir(&file).unwrap();
    symlink("/etc/passwd", &file).unwrap();
    assert!(instances.lock(IMAGE, NOW).is_err(), "no link is followed");
}

/// Guards D110.
#[test]
fn what_is_made_belongs_to_nova() {
    let (dir, _) = host();
    // Only root gives files away.
    if std::os::unix::fs::chown(dir.path(), Some(64055), Some(64056)).is_err() {
        return;
    }
    let instances = Instances::open(dir.path()).unwrap();
    fs::create_dir(dir.path().join("locks")).unwrap();
    std::os::unix::fs::chown(dir.path().join("locks"), Some(64055), Some(64056)).unwrap();
    // A pass ended between the making of the file and its giving away.
    let file = dir.path().join("locks").join(format!("nova-{}", cache_name(IMAGE)));
    File::create(&file).unwrap();
    let lock = instances.lock(IMAGE, NOW).unwrap().unwrap();
    instances.link(&lock, IMAGE, Path::new("/mnt/bases/g-1.raw")).unwrap();
    for path in [dir.path().join("_base"), file, instances.place_of(IMAGE)] {
        let found = fs::symlink_metadata(&path).unwrap();
        assert_eq!((found.uid(), found.gid()), (64055, 64056), "{}", path.display());
    }
}

#[test]
fn an_image_that_an_overlay_stands_on_is_found() {
    let (dir, instances) = host();
    let mount = Path::new("/mnt/plyfs");
    let base = mount.join("bases/g-1.raw");
    for name in ["_base", "locks", "vm1", "vm2_resize", "vm3"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    let put = |name: &str, bytes: &[u8]| fs::write(dir.path().join(name), bytes).unwrap();
    let place = instances.place_of(IMAGE);
    put("vm1/disk", &qcow2(place.to_str().unwrap().as_bytes()));
    put("vm1/disk.info", b"{}");
    put("vm1/disk.eph0", &qcow2(b""));
    put("vm1/console.log", b"QFI");
    put("vm2_resize/disk", &qcow2(b"/mnt/plyfs/bases/g-2.raw"));
    put("locks/disk", &qcow2(b"/locks"));
    put("_base/old", &qcow2(b"../_base/other"));
    put("compute_nodes", b"{}");
    // A disk of plyfs is not opened: a read of it may wait.
    symlink(mount.join("disks/vm3.raw"), dir.path().join("vm3/disk")).unwrap();
    symlink("gone", dir.path().join("vm3/disk.local")).unwrap();
    let overlays = instances.overlays(mount).unwrap();
    assert_eq!(overlays.len(), 3, "{overlays:?}");
    let on = |image: &str, base: &Path| -> Vec<PathBuf> {
        overlays.iter().filter(|overlay| overlay.stands_on(image, base)).map(|o| o.path.clone()).collect()
    };
    assert_eq!(on(IMAGE, &base), [dir.path().join("vm1/disk")]);
    assert_eq!(on("2", &mount.join("bases/g-2.raw")), [dir.path().join("vm2_resize/disk")]);
    assert_eq!(on("3", &mount.join("bases/g-3.raw")), Vec::<PathBuf>::new());
    // What cannot be understood is an error: the image may be needed.
    let mut wrong = qcow2(b"x");
    wrong[16..20].copy_from_slice(&70_000u32.to_be_bytes());
    put("vm1/disk", &wrong);
    let said = instances.overlays(mount).unwrap_err().to_string();
    assert!(said.contains("vm1/disk") && said.contains("too long"), "{said}");
    let mut cut = qcow2(b"x");
    cut.truncate(50);
    put("vm1/disk", &cut);
    assert!(instances.overlays(mount).is_err());
    put("vm1/disk", b"QFI");
    assert_eq!(backing_of(&dir.path().join("vm1/disk")).unwrap(), None);
}

#[test]
fn bytes_that_nova_or_qemu_would_not_take_as_raw_are_refused() {
    let begin = |at: usize, bytes: &[u8]| {
        let mut head = vec![0; HEAD];
        head[at..at + bytes.len()].copy_from_slice(bytes);
        head
    };
    let zeros = vec![0; HEAD];
    let mbr = begin(510, &[0x55, 0xaa]);
    let iso = begin(0x8001, b"CD001");
    let formats: [(&str, usize, &[u8]); 10] = [
        ("qcow2", 0, b"QFI\xfb\0\0\0\x03"),
        ("qed", 0, b"QED\0"),
        ("vmdk", 0, b"KDMV"),
        ("vmdk", 0, b"# Disk DescriptorFile\nversion=1\n"),
        ("vmdk", 0, b"#\n# x\nversion=1\n"),
        ("vhd", 0, b"conectix"),
        ("vhdx", 0, b"vhdxfile"),
        ("vdi", 64, &[0x7f, 0x10, 0xda, 0xbe]),
        ("luks", 0, b"LUKS\xba\xbe\0\x01"),
        ("parallels", 0, b"WithouFreSpacExt"),
    ];
    for of in ["raw", "qcow2", "vmdk"] {
        assert_eq!(refusal(of, &zeros), None);
        assert_eq!(refusal(of, &mbr), None);
        assert_eq!(refusal(of, b""), None, "a disk of no bytes");
        for (name, at, magic) in formats {
            let why = refusal(of, &begin(at, magic)).unwrap_or_else(|| panic!("{of}, {name}"));
            assert!(why.contains(name), "{why}");
        }
    }
    // A disk that is an ISO image: raw for QEMU. Nova compares it with the record when it downloads the file as it is.
    assert_eq!(refusal("iso", &iso), None);
    assert_eq!(refusal("qcow2", &iso), None);
    assert!(refusal("raw", &iso).is_some());
    assert!(refusal("iso", &zeros).is_some());
    assert!(refusal("ami", &zeros).is_some());
}
