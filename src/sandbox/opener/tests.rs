//! Each test runs in a process of its own, because only a process with one thread can fork the opener.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::Opener;
use crate::config::{Config, Overrides};
use crate::io::confine::{end_process, in_child, make_fifo};
use crate::io::sys;
use crate::source::{FileSource, OpenImage, Source, SourceErrorKind};

fn fixture() -> (TempDir, Config) {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    for part in ["store", "mnt/disks", "images", "images-other"] {
        fs::create_dir_all(dir.path().join(part)).unwrap();
    }
    for image in ["images/a.img", "images-other/b.img", "mnt/disks/c.raw"] {
        fs::write(dir.path().join(image), [0x5a; 8192]).unwrap();
    }
    let flags = Overrides {
        store: Some(dir.path().join("store")),
        mount: Some(dir.path().join("mnt")),
        ..Overrides::default()
    };
    let config = Config::load(None, flags).unwrap();
    (dir, config)
}

#[track_caller]
fn with_opener(config: &Config, work: impl FnOnce(Opener)) {
    let code = in_child(|| {
        work(Opener::start(config).unwrap());
        7
    });
    assert_eq!(code, 7, "101: a panic, negative: a signal");
}

fn kind(opener: &Opener, path: &Path) -> SourceErrorKind {
    opener.open(path).expect_err("must be refused").kind()
}

#[test]
fn the_opener_returns_the_files_and_errors_of_a_direct_open() {
    let (dir, config) = fixture();
    let path = |name: &str| dir.path().join(name);
    let fifo = CString::new(path("images/fifo").as_os_str().as_bytes()).unwrap();
    fs::write(path("images/empty"), "").unwrap();
    symlink(path("images/a.img"), path("images/link")).unwrap();
    with_opener(&config, |opener| {
        for name in ["images/a.img", "images/link", "images-other/b.img"] {
            let source = FileSource::open_with(&opener, &path(name)).unwrap();
            let direct = FileSource::open(&path(name)).unwrap();
            assert_eq!(source.identity(), direct.identity());
            assert_eq!(source.is_direct(), direct.is_direct());
            let mut bytes = [0; 100];
            assert_eq!(source.read_at(&mut bytes, 5000).unwrap(), 100);
            assert_eq!(bytes, [0x5a; 100]);
        }
        assert_eq!(kind(&opener, &path("images/nothing")), SourceErrorKind::NotFound);
        assert_eq!(kind(&opener, &path("images")), SourceErrorKind::NotAFile);
        assert_eq!(kind(&opener, &path("images/empty")), SourceErrorKind::Empty);
        assert_eq!(kind(&opener, Path::new("/dev/zero")), SourceErrorKind::NotAFile);
        assert_eq!(kind(&opener, Path::new("/proc/self/environ")), SourceErrorKind::Empty);
        assert!(make_fifo(&fifo).is_ok());
        assert_eq!(kind(&opener, &path("images/fifo")), SourceErrorKind::NotAFile);
        let long = PathBuf::from(format!("/{}", "a".repeat(5000)));
        let error = opener.open(&long).expect_err("too long").io_error().and_then(|e| e.raw_os_error());
        assert_eq!(error, Some(libc::ENAMETOOLONG));
        // The opener still works after these refusals.
        assert!(opener.open(&path("images/a.img")).is_ok());
    });
}

#[test]
fn an_opened_file_cannot_be_written() {
    let (dir, config) = fixture();
    with_opener(&config, |opener| {
        let opened = opener.open(&dir.path().join("images/a.img")).unwrap();
        let error = opened.file.write_at(b"x", 0).expect_err("read-only").raw_os_error();
        assert_eq!(error, Some(libc::EBADF));
        assert!(opened.file.set_len(0).is_err());
    });
}

#[test]
fn files_on_the_daemons_own_mount_are_refused() {
    let (dir, config) = fixture();
    symlink(dir.path().join("mnt/disks/c.raw"), dir.path().join("images/link")).unwrap();
    with_opener(&config, |opener| {
        for name in ["mnt/disks/c.raw", "images/link", "images/../mnt/disks/c.raw"] {
            let error = opener.open(&dir.path().join(name)).expect_err(name);
            assert_eq!(error.kind(), SourceErrorKind::OwnMount);
            assert!(error.to_string().contains("own mount"), "{error}");
        }
    });
}

#[test]
fn files_outside_of_base_dirs_are_refused() {
    let (dir, mut config) = fixture();
    config.security.base_dirs = vec![dir.path().join("images")];
    symlink(dir.path().join("images-other/b.img"), dir.path().join("images/out")).unwrap();
    symlink(dir.path().join("images/a.img"), dir.path().join("in")).unwrap();
    with_opener(&config, |opener| {
        assert!(opener.open(&dir.path().join("images/a.img")).is_ok());
        assert!(opener.open(&dir.path().join("in")).is_ok(), "the target of the link decides");
        for name in ["images-other/b.img", "images/out", "images/../images-other/b.img"] {
            let error = opener.open(&dir.path().join(name)).expect_err(name);
            assert_eq!(error.kind(), SourceErrorKind::Outside);
            assert!(error.to_string().contains("base_dirs"), "{error}");
        }
    });
}

/// A worker of root has no capability to read other users' files, and serves their images nevertheless.
#[test]
fn images_of_other_users_can_be_bases_of_root() {
    if sys::effective_ids().0 != 0 {
        println!("SKIP: needs root");
        return;
    }
    let (dir, config) = fixture();
    let image = dir.path().join("images/a.img");
    for path in [&image, &dir.path().join("images")] {
        chown(path, Some(65534), Some(65534)).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).unwrap();
    }
    with_opener(&config, |opener| assert!(opener.open(&image).is_ok()));
}

#[test]
fn many_concurrent_requests_are_answered() {
    let (dir, config) = fixture();
    let image = dir.path().join("images/a.img");
    with_opener(&config, |opener| {
        std::thread::scope(|scope| {
            for _ in 0..40 {
                scope.spawn(|| (0..20).for_each(|_| assert!(opener.open(&image).is_ok())));
            }
        });
    });
}

/// A missing opener is no error of a base: the worker ends, and the supervisor starts the next one.
#[test]
fn a_worker_without_its_opener_ends() {
    let (dir, config) = fixture();
    let image = dir.path().join("images/a.img");
    let code = in_child(|| {
        let opener = Opener::start(&config).unwrap();
        assert!(opener.open(&image).is_ok());
        let children = fs::read_to_string(format!("/proc/self/task/{0}/children", sys::pid())).unwrap();
        end_process(children.trim().parse().unwrap());
        let _ = opener.open(&image);
        7
    });
    assert_eq!(code, -libc::SIGABRT);
}

/// A socket of the host is reached only below the directories for sockets, and not at all without one.
#[test]
fn sockets_outside_of_their_directories_are_refused() {
    let (dir, mut config) = fixture();
    let path = |name: &str| dir.path().join(name);
    let (inside, outside) = (path("images/socket"), path("images-other/socket"));
    let listeners = [&inside, &outside].map(|path| std::os::unix::net::UnixListener::bind(path).unwrap());
    symlink(&outside, path("images/link")).unwrap();
    let refused = |opener: &Opener, name: &str| opener.connect(&path(name)).expect_err(name).kind();
    with_opener(&config, |opener| {
        assert_eq!(refused(&opener, "images/socket"), SourceErrorKind::Outside);
        // Without the key it has no such call either: the filter is what it was.
        assert!(opener.open(&path("images/a.img")).is_ok());
    });
    config.security.nbd_socket_dirs = vec![path("images")];
    with_opener(&config, |opener| {
        assert!(opener.connect(&inside).is_ok());
        for name in ["images-other/socket", "images/link", "images/../images-other/socket"] {
            assert_eq!(refused(&opener, name), SourceErrorKind::Outside);
        }
        assert_eq!(refused(&opener, "images/a.img"), SourceErrorKind::NotAFile);
        assert_eq!(refused(&opener, "images/none"), SourceErrorKind::NotFound);
        assert_eq!(refused(&opener, "mnt/disks/c.raw"), SourceErrorKind::OwnMount);
        assert!(opener.open(&path("images/a.img")).is_ok());
    });
    drop(listeners);
}
