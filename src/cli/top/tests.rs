use std::time::{Duration, Instant, SystemTime};

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{Event, KeyCode, KeyEvent, KeyModifiers};
use serde_json::{Value, json};

use super::app::{App, Tab, Then};
use super::sample::{BASES, DISKS, Frame, SERVERS, Sample};
use super::view;
use crate::cli::listing::Choice;
use crate::control::wire::Stats;

fn counters(reads: u64, writes: u64) -> Value {
    json!({
        "operations": {
            "read": {"count": reads, "bytes": reads * 4096, "latency_ns": reads * 250_000},
            "write": {"count": writes, "bytes": writes * 8192, "latency_ns": writes * 3_000_000, "errors": 2},
            "flush": {"count": 10},
            "open": {"count": 1000},
        },
        "read_from": {
            "delta": {"count": 1, "bytes": 5}, "memory": {"count": 1, "bytes": reads * 3},
            "fetched": {"count": 1, "bytes": reads},
        },
        "waits": reads / 10, "waited_ns": reads * 1_000_000,
    })
}

/// A sample with `disks` disks, of which disk `n` has done `reads(n)` reads.
fn sample(seconds: u64, worker: u32, disks: u64, reads: impl Fn(u64) -> u64) -> Sample {
    let ids = || 1..=disks;
    let stat = |n: u64| json!({"id": n, "name": format!("vm{n}"), "base": "debian", "counters": counters(reads(n), 5)});
    let disk = |n: u64| {
        json!({"id": n, "name": format!("vm{n}"), "base": "debian", "state": "ok", "size": 1 << 30,
               "delta_bytes": reads(n) * 1000})
    };
    let traffic = json!({
        "hit": {"memory": {"bytes": 3 * reads(1)}}, "miss": {"demand": {"bytes": reads(1)}},
        "evict": {"space": {"bytes": 7}},
    });
    let stats: Stats = serde_json::from_value(json!({
        "since": format!("worker {worker}"), "worker": worker,
        "all_disks": counters(ids().map(&reads).sum(), 5 * disks),
        "disks": ids().map(stat).collect::<Vec<_>>(),
        "bases": [{"id": 9, "name": "debian", "counters": {}, "traffic": traffic}],
    }))
    .expect("counters");
    let bases = json!([{
        "id": 9, "name": "debian", "state": "ok", "disks": disks, "cached_bytes": 1 << 20,
        "source": "https://images.example.org/debian.qcow2",
        "servers": [{"url": "https://images.example.org/debian.qcow2", "trouble": "status 503"}],
    }]);
    Sample {
        at: Instant::now() + Duration::from_secs(seconds),
        time: SystemTime::UNIX_EPOCH + Duration::from_secs(seconds),
        stats,
        disks: ids().map(|n| serde_json::from_value(disk(n)).expect("a disk")).collect(),
        bases: serde_json::from_value(bases).expect("bases"),
    }
}

/// Two seconds in which disk `n` did `100 * n` reads.
fn frame(disks: u64) -> Frame {
    let mut before = sample(0, 1, disks, |_| 1000);
    let mut now = sample(2, 1, disks, |n| 1000 + 100 * n);
    now.at = before.at + Duration::from_secs(2);
    before.time = SystemTime::UNIX_EPOCH;
    now.time = SystemTime::UNIX_EPOCH + Duration::from_secs(2);
    Frame::between(&before, &now)
}

fn app(disks: u64) -> App {
    let mut choice = Choice::default();
    choice.sort_by_default(super::BUSIEST);
    let mut app = App::new(choice, 2);
    app.take(Ok(frame(disks)));
    app
}

fn press(app: &mut App, keys: &str) -> Then {
    let mut then = Then::GoOn;
    for key in keys.chars() {
        let code = match key {
            '\t' => KeyCode::Tab,
            '\n' => KeyCode::Enter,
            '\u{1b}' => KeyCode::Esc,
            '\u{8}' => KeyCode::Backspace,
            other => KeyCode::Char(other),
        };
        then = app.event(&Event::Key(KeyEvent::new(code, KeyModifiers::NONE)));
    }
    then
}

fn press_key(app: &mut App, code: KeyCode) {
    app.event(&Event::Key(KeyEvent::new(code, KeyModifiers::NONE)));
}

/// The lines of the screen.
fn screen(app: &mut App, (width, height): (u16, u16)) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal in memory");
    terminal.draw(|screen| view::draw(screen, app)).expect("drawn");
    let buffer = terminal.backend().buffer();
    let cell = |x, y| buffer.cell((x, y)).map_or(" ", |cell| cell.symbol());
    (0..height).map(|y| (0..width).map(|x| cell(x, y)).collect::<String>().trim_end().to_owned()).collect()
}

fn first_word(line: &str) -> &str {
    line.split_whitespace().next().unwrap_or_default()
}

#[test]
fn rates_are_the_differences_of_two_looks() {
    let frame = frame(3);
    assert_eq!((frame.seconds, frame.worker, frame.worker_changed), (2.0, 1, false));
    let row = &frame.disks[1];
    assert_eq!(
        row,
        &json!({
            "name": "vm2", "base": "debian", "state": "ok",
            "operations_per_second": 100.0, "reads_per_second": 100.0, "writes_per_second": 0.0,
            "read_bytes_per_second": 409_600, "write_bytes_per_second": 0,
            "read_latency_us": 250, "write_latency_us": null, "hit_percent": 75.0,
            "waits_per_second": 10.0, "wait_us": 10_000, "errors_per_second": 0.0,
            "delta_bytes": 1_200_000, "delta_growth_per_second": 100_000,
        })
    );
    assert_eq!(frame.total["reads_per_second"], 300.0);
    assert_eq!(
        (&frame.total["disks"], &frame.total["delta_growth_per_second"]),
        (&json!(3), &json!(300_000))
    );
    let base = &frame.bases[0];
    assert_eq!((&base["hit_bytes_per_second"], &base["fetched_bytes_per_second"]), (&json!(150), &json!(50)));
    assert_eq!((&base["hit_percent"], &base["evicted_bytes_per_second"]), (&json!(75.0), &json!(0)));
    assert_eq!(frame.servers[0]["trouble"], "status 503");
}

#[test]
fn the_counters_of_another_worker_begin_at_zero() {
    let before = sample(0, 1, 1, |_| 1_000_000);
    let mut now = sample(1, 2, 1, |_| 50);
    now.at = before.at + Duration::from_secs(1);
    let frame = Frame::between(&before, &now);
    assert!(frame.worker_changed);
    assert_eq!(frame.disks[0]["reads_per_second"], 50.0);
    assert!(view::summary(&frame)[0].contains("another worker than before"));
}

#[test]
fn a_disk_that_appears_between_two_looks_has_no_growth() {
    let before = sample(0, 1, 1, |_| 0);
    let mut now = sample(1, 1, 2, |n| n * 10);
    now.at = before.at + Duration::from_secs(1);
    let frame = Frame::between(&before, &now);
    assert_eq!(
        (&frame.disks[0]["delta_growth_per_second"], &frame.disks[1]["delta_growth_per_second"]),
        (&json!(10_000), &json!(0))
    );
    assert_eq!(frame.disks[1]["reads_per_second"], 20.0);
}

/// Each row has the keys of the columns of its table.
#[test]
fn columns_are_keys_of_the_rows() {
    let frame = frame(1);
    let tables = [(&DISKS[..], &frame.disks), (&BASES[..], &frame.bases), (&SERVERS[..], &frame.servers)];
    for (columns, rows) in tables {
        for (_, key, _) in columns {
            assert!(rows[0].get(key).is_some(), "{key}: {}", rows[0]);
        }
    }
}

#[test]
fn the_screen_shows_the_busiest_disks_of_a_thousand() {
    let mut app = app(1000);
    let lines = screen(&mut app, (160, 24));
    assert!(lines[1].starts_with("disks: 1000, bases: 1, servers: 1 (1 with trouble)"), "{lines:#?}");
    assert!(lines[3].contains("1-18 of 1000"), "{lines:#?}");
    assert_eq!(first_word(&lines[4]), "NAME");
    assert_eq!(first_word(&lines[5]), "vm1000");
    assert_eq!(first_word(&lines[22]), "vm983");
    assert!(lines[23].starts_with("q quit"), "{lines:#?}");
    // Only the rows that are shown are drawn.
    press_key(&mut app, KeyCode::End);
    let lines = screen(&mut app, (160, 24));
    assert!(lines[3].contains("983-1000 of 1000") && first_word(&lines[22]) == "vm1", "{lines:#?}");
    press_key(&mut app, KeyCode::PageUp);
    press_key(&mut app, KeyCode::Up);
    assert!(screen(&mut app, (160, 24))[3].contains("964-981 of 1000"));
    press_key(&mut app, KeyCode::Home);
    assert!(screen(&mut app, (160, 24))[3].contains("1-18 of 1000"));
}

#[test]
fn the_screen_fits_every_size() {
    let mut app = app(50);
    for (width, height) in [(1, 1), (10, 5), (20, 6), (40, 10), (80, 24), (300, 100)] {
        for keys in ["", "?", "?", "\t", "\t", "\t"] {
            press(&mut app, keys);
            screen(&mut app, (width, height));
        }
    }
    let lines = screen(&mut app, (80, 24));
    assert!(lines[5].starts_with("vm50"), "{lines:#?}");
}

#[test]
fn keys_sort_turn_and_filter() {
    let mut app = app(30);
    let names = |app: &mut App| {
        let lines = screen(app, (160, 40));
        lines[5..]
            .iter()
            .map(|line| first_word(line).to_owned())
            .take_while(|name| name.starts_with("vm"))
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&mut app)[0], "vm30");
    press(&mut app, "r");
    assert_eq!(names(&mut app)[0], "vm1");
    // Left of OPS/S is NAME, whose order is that of the alphabet.
    press(&mut app, "<");
    assert_eq!(names(&mut app)[..3], ["vm1", "vm10", "vm11"]);
    press(&mut app, "<");
    assert_eq!(app.order().map(|((title, ..), _)| title), Some("STATE"));
    press(&mut app, ">>");
    press(&mut app, "/vm2\n");
    assert_eq!(names(&mut app).len(), 11);
    assert!(screen(&mut app, (160, 40))[3].contains("1-11 of 11 (of 30)"));
    press(&mut app, "/xyz\u{8}\u{8}\u{8}name=vm7\n");
    assert_eq!(names(&mut app), ["vm7"]);
    // A wrong filter is named and changes nothing.
    press(&mut app, "/colour=red\n");
    assert!(screen(&mut app, (160, 40))[39].contains("there is no column"));
    assert_eq!(names(&mut app), ["vm7"]);
    // While a filter is typed, keys are text.
    assert_eq!(press(&mut app, "/q"), Then::GoOn);
    assert_eq!(screen(&mut app, (160, 40))[39], "filter: q_");
    press(&mut app, "\u{1b}");
    assert_eq!(press(&mut app, "\u{1b}"), Then::GoOn, "Esc first removes the filter");
    assert_eq!(names(&mut app).len(), 30);
    assert_eq!(press(&mut app, "\u{1b}"), Then::Quit);
    assert_eq!(press(&mut app, "q"), Then::Quit);
    let ctrl_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert_eq!(app.event(&Event::Key(ctrl_c)), Then::Quit);
}

#[test]
fn a_paused_screen_stays_and_an_error_leaves_the_last_numbers() {
    let mut app = app(3);
    press(&mut app, "p");
    app.take(Ok(frame(5)));
    let lines = screen(&mut app, (120, 24));
    assert!(lines[1].starts_with("disks: 3,") && lines[3].ends_with("PAUSED"), "{lines:#?}");
    press(&mut app, " ");
    app.take(Ok(frame(5)));
    assert!(screen(&mut app, (120, 24))[1].starts_with("disks: 5,"));
    app.take(Err(crate::cli::error::CliError::Usage("the daemon does not answer\u{1b}[2J".to_owned())));
    let lines = screen(&mut app, (120, 24));
    assert!(lines[1].starts_with("disks: 5,"), "{lines:#?}");
    assert_eq!(lines[23], "the daemon does not answer\\u{1b}[2J");
}

#[test]
fn tabs_have_their_own_order_and_filter() {
    let mut app = app(3);
    press(&mut app, "/vm2\n\t");
    assert_eq!(app.tab(), Tab::Bases);
    let lines = screen(&mut app, (160, 24));
    assert_eq!(first_word(&lines[5]), "debian");
    press(&mut app, "\t");
    let lines = screen(&mut app, (160, 24));
    assert!(lines[5].contains("status 503"), "{lines:#?}");
    press(&mut app, "\t");
    assert_eq!(app.filters(), ["name~vm2"]);
}

#[test]
fn the_interval_has_bounds() {
    let mut app = app(1);
    press(&mut app, "-----");
    assert_eq!(app.interval(), 1);
    press(&mut app, &"+".repeat(100));
    assert_eq!(app.interval(), 60);
}
