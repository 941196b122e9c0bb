//! The tests of the helper process run in processes of their own, because only a process with one thread can fork it.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::{CredentialHelper, GRANTED, LONGEST, REFUSED, carry_out, execute, read};
use crate::config::{CloudConfig, Config, CredentialConfig, Overrides};
use crate::io::confine::{MAX_MESSAGE, end_process, in_child, receive_message};
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

const CLOUDS: &str = "clouds: {prod: {auth: {auth_url: 'http://ADDRESS', username: u, project_name: p}}}";

/// The worker gets a token and never the password, which the helper reads anew each time.
#[test]
fn the_helper_asks_keystone_itself_and_passes_on_the_token_alone() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let (dir, mut config) = fixture(false);
    let clouds = dir.path().join("secrets/clouds.yaml");
    fs::write(&clouds, CLOUDS.replace("ADDRESS", &address.to_string())).unwrap();
    let secure = |password: &str| {
        fs::write(
            dir.path().join("secrets/secure.yaml"),
            format!("clouds: {{prod: {{auth: {{password: {password}}}}}}}"),
        )
        .unwrap();
    };
    secure("geheim");
    let cloud = |name: &str| CloudConfig { name: name.into(), file: clouds.clone(), locations: Vec::new() };
    config.http.clouds = vec![cloud("prod"), cloud("none")];
    let keystone = std::thread::spawn(move || {
        let mut bodies = Vec::new();
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().unwrap();
            bodies.push(answer_token(&mut stream));
        }
        bodies
    });
    with_helper(&config, |helper| {
        let cloud = |number| helper.get(SecretName { section: Section::Cloud, number });
        let session = text(cloud(0));
        assert!(session.contains("token-of-the-test") && !session.contains("geheim"), "{session}");
        secure("neu");
        text(cloud(0));
        let why = cloud(1).unwrap_err();
        assert!(why.contains("clouds.yaml has no cloud none; it has: prod"), "{why}");
        assert!(cloud(2).unwrap_err().contains("no credential of this number"));
        // What it reads is still limited to its files.
        assert_eq!(text(helper.get(http(0))), "first");
        assert!(helper.get(http(1)).unwrap_err().contains("denied"));
    });
    let bodies = keystone.join().unwrap();
    assert!(
        bodies[0].contains("\"password\":\"geheim\"") && bodies[1].contains("\"password\":\"neu\""),
        "{bodies:?}"
    );
}

/// Reads one request for a token, and answers it. Returns the body of the request.
fn answer_token(stream: &mut std::net::TcpStream) -> String {
    use std::io::{Read as _, Write as _};
    let mut got = Vec::new();
    let body = loop {
        let mut piece = [0; 4096];
        let read = stream.read(&mut piece).unwrap();
        got.extend_from_slice(&piece[..read]);
        let text = String::from_utf8_lossy(&got).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length =
            head.lines().find_map(|line| line.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
        if body.len() >= length.unwrap_or(0) {
            break body.to_owned();
        }
    };
    let answer =
        "{\"token\": {\"issued_at\": \"2026-11-30T14:00:00Z\", \"expires_at\": \"2026-11-30T15:00:00Z\"}}";
    let length = answer.len();
    write!(
        stream,
        "HTTP/1.1 201 Created\r\nX-Subject-Token: token-of-the-test\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{answer}"
    )
    .unwrap();
    body
}

/// A worker without an answer takes the helper for gone and aborts.
#[test]
fn a_request_that_cannot_be_carried_out_is_answered() {
    let asked = |thread: std::thread::Builder, work: fn() -> Result<Secret, String>| {
        let (ours, theirs) = sys::message_pair().unwrap();
        carry_out(thread, theirs, work);
        let mut answer = vec![0; MAX_MESSAGE];
        let (got, _) = receive_message(ours.as_fd(), &mut answer).unwrap();
        assert!(got > 1, "no answer");
        (answer[0], String::from_utf8(answer[1..got].to_vec()).unwrap())
    };
    let plain = std::thread::Builder::new;
    assert_eq!(asked(plain(), || Ok(Secret::new(b"abc".to_vec()))), (GRANTED, "abc".into()));
    let (kind, why) = asked(plain(), || panic!("a bug"));
    assert!(kind == REFUSED && why.contains("a bug of plyfs"), "{why}");
    // As when the host has no more threads.
    let (kind, why) = asked(plain().stack_size(1 << 60), || Ok(Secret::new(Vec::new())));
    assert!(kind == REFUSED && why.contains("no thread"), "{why}");
}
