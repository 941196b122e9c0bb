//! The tests of the helper process run in processes of their own, because only a process with one thread can fork it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::{CredentialHelper, LONGEST, execute, read};
use crate::config::{Config, CredentialConfig, Overrides};
use crate::io::confine::{end_process, in_child};
use crate::io::sys;
use crate::source::http::{Credentials, Secret, SecretName, Section};

fn shell(script: &str, time: Duration) -> Result<Secret, String> {
    execute("/bin/sh", &["-c".into(), script.into()], ("PLYFS_URL", "https://h/"), time)
}

fn text(secret: Result<Secret, String>) -> String {
    String::from_utf8(secret.unwrap().bytes().to_vec()).unwrap()
}

fn http(number: usize) -> SecretName {
    SecretName { section: Section::Http, number }
}

const LONG: Duration = Duration::from_secs(20);

#[test]
fn a_program_prints_a_secret() {
    assert_eq!(text(shell("echo token", LONG)), "token\n");
    assert_eq!(text(shell("printf %s \"$PLYFS_URL\"", LONG)), "https://h/");
    let environment = text(shell("/usr/bin/env", LONG));
    for line in environment.lines() {
        let name = line.split_once('=').unwrap().0;
        // The shell adds variables of its own.
        assert!(["PATH", "PLYFS_URL", "PWD", "SHLVL", "_", "OLDPWD"].contains(&name), "{line}");
    }
    let why = shell("echo hidden; echo hidden >&2; exit 3", LONG).unwrap_err();
    assert!(why.contains("exit status: 3") && !why.contains("hidden"), "{why}");
    let why = shell("head -c 9000 /dev/zero", LONG).unwrap_err();
    assert!(why.contains(&format!("longer than {LONGEST} bytes")), "{why}");
    assert!(
        execute("/no/such/program", &[], ("PLYFS_URL", "https://h/"), LONG)
            .unwrap_err()
            .contains("No such file")
    );
}

#[test]
fn a_program_that_hangs_is_killed_with_its_children() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let pid = dir.path().join("pid");
    let begin = Instant::now();
    // In the first script a child holds the output open. The second one closes its output and does not end.
    for script in
        [format!("sleep 1000 & echo $! > {0}; sleep 1000", pid.display()), "exec >&-; sleep 1000".into()]
    {
        let why = shell(&script, Duration::from_millis(500)).unwrap_err();
        assert!(why.contains("longer than 500ms"), "{why}");
    }
    assert!(begin.elapsed() < Duration::from_secs(100));
    let child = fs::read_to_string(&pid).unwrap();
    let gone = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", child.trim())).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    };
    while !gone() {
        assert!(begin.elapsed() < Duration::from_secs(100), "its child lives on");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn only_regular_files_are_read() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = dir.path().join("token");
    fs::write(&path, "abc\n").unwrap();
    assert_eq!(text(read(&path)), "abc\n");
    fs::write(&path, vec![b'a'; LONGEST + 1]).unwrap();
    assert!(read(&path).unwrap_err().contains("longer"));
    assert!(read(dir.path()).is_err());
    assert!(read(Path::new("/dev/zero")).unwrap_err().contains("not a regular file"));
    assert!(read(&dir.path().join("none")).unwrap_err().contains("No such file"));
}

fn fixture(command: bool) -> (TempDir, Config) {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    for part in ["store", "secrets", "other"] {
        fs::create_dir(dir.path().join(part)).unwrap();
    }
    fs::write(dir.path().join("secrets/token"), "first").unwrap();
    fs::set_permissions(dir.path().join("secrets/token"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::write(dir.path().join("other/token"), "other").unwrap();
    std::os::unix::fs::symlink(dir.path().join("other/token"), dir.path().join("secrets/link")).unwrap();
    let flags = Overrides {
        store: Some(dir.path().join("store")),
        mount: Some(dir.path().join("mnt")),
        ..Overrides::default()
    };
    let mut config = Config::load(None, flags).unwrap();
    let credential = |file: Option<&str>, command: Option<&str>| CredentialConfig {
        url: "https://h/".into(),
        bearer_file: file.map(|file| dir.path().join(file)),
        basic_file: None,
        header_file: None,
        command: command.map(|script| vec!["/bin/sh".into(), "-c".into(), script.into()]),
        renew: None,
    };
    config.http.credentials =
        vec![credential(Some("secrets/token"), None), credential(Some("secrets/link"), None)];
    if command {
        config.http.credentials.push(credential(None, Some("echo printed")));
    }
    (dir, config)
}

#[track_caller]
fn with_helper(config: &Config, work: impl FnOnce(CredentialHelper)) {
    let code = in_child(|| {
        work(CredentialHelper::start(config).unwrap().unwrap());
        7
    });
    assert_eq!(code, 7, "101: a panic, negative: a signal");
}

#[test]
fn the_helper_reads_the_files_that_the_configuration_names() {
    let (dir, config) = fixture(false);
    with_helper(&config, |helper| {
        assert_eq!(text(helper.get(http(0))), "first");
        // A secret is renewed by a rename.
        fs::write(dir.path().join("secrets/new"), "second").unwrap();
        fs::rename(dir.path().join("secrets/new"), dir.path().join("secrets/token")).unwrap();
        assert_eq!(text(helper.get(http(0))), "second");
        // The helper reads in these directories only, so it cannot follow a link out of them.
        let why = helper.get(http(1)).unwrap_err();
        assert!(why.contains("secrets/link") && why.contains("denied"), "{why}");
        assert!(helper.get(http(7)).unwrap_err().contains("no credential of this number"));
        fs::remove_file(dir.path().join("secrets/token")).unwrap();
        let why = helper.get(http(0)).unwrap_err();
        assert!(why.contains("secrets/token") && why.contains("No such file"), "{why}");
    });
}

#[test]
fn the_helper_runs_the_commands_that_the_configuration_names() {
    let (_dir, config) = fixture(true);
    with_helper(&config, |helper| {
        assert_eq!(text(helper.get(http(2))), "printed\n");
        assert_eq!(text(helper.get(http(0))), "first");
        assert_eq!(text(helper.get(http(1))), "other", "with the rights of the daemon");
    });
}

#[test]
fn without_credentials_no_helper_runs() {
    let (_dir, mut config) = fixture(false);
    config.http.credentials.clear();
    assert_eq!(in_child(|| i32::from(CredentialHelper::start(&config).unwrap().is_none())), 1);
}

#[test]
fn a_worker_without_its_credential_helper_ends() {
    let (_dir, config) = fixture(false);
    let code = in_child(|| {
        let helper = CredentialHelper::start(&config).unwrap().unwrap();
        assert_eq!(text(helper.get(http(0))), "first");
        let children = fs::read_to_string(format!("/proc/self/task/{0}/children", sys::pid())).unwrap();
        end_process(children.trim().parse().unwrap());
        let _ = helper.get(http(0));
        7
    });
    assert_eq!(code, -libc::SIGABRT);
}
