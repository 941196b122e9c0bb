use std::path::Path;

use super::*;

fn shell(script: &str) -> Vec<String> {
    ["/bin/sh", "-c", script].map(str::to_owned).into()
}

#[test]
fn the_command_gets_the_events_as_its_input() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = dir.path().join("out");
    let command = shell(&format!("cat >{}", out.display()));
    execute(&command, b"{\"event\":\"base.hit\"}\n", TIME).expect("it succeeds");
    assert_eq!(std::fs::read(&out).expect("the input"), b"{\"event\":\"base.hit\"}\n");
    execute(&shell("exit 0"), &[b'x'; 8192], TIME).expect("it need not read its input");
}

#[test]
fn a_command_that_fails_or_hangs_is_an_error_and_nothing_else() {
    let why = execute(&shell("exit 3"), b"x", TIME).expect_err("it fails");
    assert!(why.starts_with("/bin/sh: it failed") && why.contains('3'), "{why}");
    let why = execute(&shell("sleep 1000 & wait"), b"x", Duration::from_millis(50)).expect_err("it hangs");
    assert!(why.contains("longer than 50ms"), "{why}");
    let missing = ["/no/such/program".to_owned()];
    let why = execute(&missing, b"x", TIME).expect_err("there is none");
    assert!(why.contains("/no/such/program"), "{why}");
}

#[test]
fn the_helper_runs_the_configured_command() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = dir.path().join("out");
    let file = dir.path().join("plyfs.toml");
    let command = shell(&format!("cat >>{}; test ! -e {}", out.display(), dir.path().join("fail").display()));
    let text = format!("[store]\npath = '/srv/plyfs'\n[notify]\ncommand = {command:?}\n");
    std::fs::write(&file, text).expect("write the file");
    let config = Config::load(Some(Path::new(&file)), crate::config::Overrides::default()).expect("valid");
    let code = process::in_child(|| {
        let Ok(Some(helper)) = NotifyHelper::start(&config) else { return 2 };
        if helper.run(b"one\n").is_err() || helper.run(b"two\n").is_err() {
            return 3;
        }
        if std::fs::write(dir.path().join("fail"), "").is_err() || helper.run(b"three\n").is_ok() {
            return 4;
        }
        0
    });
    assert_eq!(code, 0);
    assert_eq!(std::fs::read_to_string(&out).expect("the input"), "one\ntwo\nthree\n");
}
