//! What needs no server; the rest is in tests/http/.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use reqwest::StatusCode;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};

use super::answer::{Asked, Failure, judge};
use super::identity::retry_after;
use super::limit::Slots;
use super::origin::Origin;
use super::shown;
use crate::source::Purpose;

#[test]
fn urls_are_shown_without_what_is_secret() {
    for (url, text) in [
        ("https://h/a/b.img", "https://h/a/b.img"),
        ("https://h:8443/a?sig=s#f", "https://h:8443/a"),
        ("https://u:s@h/a", "https://h/a"),
        ("https://u@h/a@b", "https://h/a@b"),
        ("https://u:s@s@h/a", "https://h/a"),
        ("http:///u:s@h/a", "http://h/a"),
        ("http:\\\\u:s@h/a", "http://h/a"),
        ("ftp://u:s@h/a?s", "ftp://h/a"),
        ("u:s@h/a", "h/a"),
        ("http://u:s@[broken/a", "[broken/a"),
        ("/a/b?s", "/a/b"),
        ("a\nb\u{1b}[1m?s", "a\u{fffd}b\u{fffd}[1m"),
    ] {
        assert_eq!(shown(url), text, "{url}");
    }
}

fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
    lines
        .iter()
        .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap()))
        .collect()
}

#[test]
fn servers_say_how_long_they_want_to_be_left_alone() {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    for (text, seconds) in [
        ("0", Some(0)),
        (" 120 ", Some(120)),
        ("Sun, 09 Sep 2001 01:47:40 GMT", Some(60)),
        ("Sun, 09 Sep 2001 01:40:00 GMT", Some(0)),
        ("-5", None),
        ("soon", None),
    ] {
        assert_eq!(retry_after(text, now), seconds.map(Duration::from_secs), "{text}");
    }
    let asked = Asked { range: 0..10, pinned: None };
    let far = judge(StatusCode::SERVICE_UNAVAILABLE, &headers(&[("retry-after", "999999999")]), &asked);
    assert!(
        matches!(far, Err(Failure::Again { after: Some(after), .. }) if after <= Duration::from_secs(600))
    );
}

/// Numbers that no object can have are no arithmetic's problem.
#[test]
fn absurd_numbers_are_refused() {
    let asked = Asked { range: u64::MAX - 10..u64::MAX, pinned: None };
    for line in [
        "bytes 0-18446744073709551615/18446744073709551615",
        "bytes 18446744073709551605-18446744073709551615/*",
        "bytes 18446744073709551616-18446744073709551617/18446744073709551618",
        "bytes 5-4/10",
        "bytes 10-10/10",
        "bytes +1-2/10",
        "bytes */10",
        "bytes",
        "",
    ] {
        let found = judge(StatusCode::PARTIAL_CONTENT, &headers(&[("content-range", line)]), &asked);
        assert!(matches!(found, Err(Failure::Protocol(_))), "{line}: {found:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn slots_go_to_readers_first_and_are_not_lost() {
    let slots = Slots::new(4);
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(slots.get(Purpose::Hydrate).await);
    }
    let second = Duration::from_secs(1);
    assert!(tokio::time::timeout(second, slots.get(Purpose::Hydrate)).await.is_err(), "one is for readers");
    held.push(slots.get(Purpose::Demand).await);
    let order = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let mut tasks = Vec::new();
    for purpose in [Purpose::Hydrate, Purpose::Prefetch, Purpose::Readahead, Purpose::Demand] {
        let (slots, order) = (slots.clone(), order.clone());
        tasks.push(tokio::spawn(async move {
            let slot = slots.get(purpose).await;
            order.lock().push(purpose);
            tokio::time::sleep(second).await;
            drop(slot);
        }));
        tokio::task::yield_now().await;
    }
    // Of two that wait, the first has given up.
    let given_up = tokio::spawn({
        let slots = slots.clone();
        async move { drop(slots.get(Purpose::Demand).await) }
    });
    tokio::task::yield_now().await;
    given_up.abort();
    drop(held.pop());
    for task in tasks {
        // The others are held on to: what is free goes from one to the next.
        if held.len() > 1 {
            drop(held.pop());
        }
        task.await.unwrap();
    }
    assert_eq!(order.lock()[0], Purpose::Demand);
    drop(held);
    for _ in 0..2 {
        let four = [
            slots.get(Purpose::Demand).await,
            slots.get(Purpose::Demand).await,
            slots.get(Purpose::Demand).await,
            slots.get(Purpose::Demand).await,
        ];
        drop(four);
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_down_is_asked_less_and_less() {
    let origin = Origin::new();
    let mut pauses = Vec::new();
    origin.enter().ok().expect("it works").failed("down", None);
    for _ in 0..10 {
        let since = tokio::time::Instant::now();
        let pass = loop {
            match origin.enter() {
                Ok(pass) => break pass,
                Err(down) => {
                    assert_eq!(down.why, "down");
                    down.over().await;
                }
            }
        };
        assert!(origin.enter().is_err(), "one at a time");
        pauses.push(since.elapsed());
        pass.failed("down", None);
    }
    let milliseconds = |pause: &Duration| pause.as_millis();
    assert!((100..=201).contains(&milliseconds(&pauses[0])), "{pauses:?}");
    assert!((800..=1602).contains(&milliseconds(&pauses[3])), "{pauses:?}");
    assert!((10_000..=20_001).contains(&milliseconds(&pauses[9])), "{pauses:?}");
    // What was under way together fails together, and counts as one.
    let origin = Origin::new();
    let passes: Vec<_> = (0..10).map(|_| origin.enter().ok().expect("it works")).collect();
    let since = tokio::time::Instant::now();
    for pass in passes {
        pass.failed("down", None);
    }
    let mut pass = loop {
        match origin.enter() {
            Ok(pass) => break pass,
            Err(down) => down.over().await,
        }
    };
    assert!(since.elapsed() <= Duration::from_millis(201), "{:?}", since.elapsed());
    // When it works again, it works for all.
    pass.worked();
    let all: Vec<_> = (0..10).map(|_| origin.enter().ok().expect("it works")).collect();
    drop(all);
    assert_eq!(origin.down_until(), None);
}
