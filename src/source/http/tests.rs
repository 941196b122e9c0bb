//! Tests without a server. tests/http/ has those with one.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use reqwest::StatusCode;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};

use super::address::{AllowList, Reach, Zone, not_public, reachable};
use super::answer::{Failure, RangeRequest, Sending, judge};
use super::gate::Gate;
use super::identity::retry_after;
use super::limit::{Party, Slots};
use super::shown;
use crate::source::Purpose;

#[test]
fn urls_are_shown_without_secrets() {
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
        ("https://u:s?s@[broken/a", "https://"),
        ("https://u:s#s@[broken/a", "https://"),
        ("https://[broken/a?sig=s@s", "https://"),
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
fn retry_after_is_seconds_or_a_date() {
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
    let asked = RangeRequest { range: 0..10, ..RangeRequest::default() };
    let far = judge(StatusCode::SERVICE_UNAVAILABLE, &headers(&[("retry-after", "999999999")]), &asked);
    assert!(
        matches!(far, Err(Failure::Again { after: Some(after), .. }) if after <= Duration::from_secs(10))
    );
}

/// Arithmetic on numbers that no object can have does not overflow.
#[test]
fn absurd_numbers_are_refused() {
    let asked = RangeRequest { range: u64::MAX - 10..u64::MAX, ..RangeRequest::default() };
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

/// A transfer of a whole image asks for no range. A part of any length would be held in memory until its end.
#[test]
fn a_part_is_no_answer_to_a_request_for_the_whole() {
    let asked = RangeRequest { range: 0..1 << 40, sending: Sending::Whole, ..RangeRequest::default() };
    let lines = headers(&[("content-range", "bytes 0-1099511627775/1099511627776")]);
    let found = judge(StatusCode::PARTIAL_CONTENT, &lines, &asked);
    assert!(matches!(&found, Err(Failure::Protocol(why)) if why.contains("206")), "{found:?}");
}

/// Guards H7.
#[tokio::test(start_paused = true)]
async fn slots_go_to_readers_first_and_are_not_lost() {
    let (slots, party) = (Slots::new(4), Party::new());
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(slots.get(party, Purpose::Hydrate).await);
    }
    let second = Duration::from_secs(1);
    assert!(
        tokio::time::timeout(second, slots.get(party, Purpose::Hydrate)).await.is_err(),
        "one is for readers"
    );
    held.push(slots.get(party, Purpose::Demand).await);
    let order = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let mut tasks = Vec::new();
    for purpose in [Purpose::Hydrate, Purpose::Prefetch, Purpose::Readahead, Purpose::Demand] {
        let (slots, order) = (slots.clone(), order.clone());
        tasks.push(tokio::spawn(async move {
            let slot = slots.get(party, purpose).await;
            order.lock().push(purpose);
            tokio::time::sleep(second).await;
            drop(slot);
        }));
        tokio::task::yield_now().await;
    }
    // Of two waiters, the first has gone away.
    let given_up = tokio::spawn({
        let slots = slots.clone();
        async move { drop(slots.get(party, Purpose::Demand).await) }
    });
    tokio::task::yield_now().await;
    given_up.abort();
    drop(held.pop());
    for task in tasks {
        // The other slots stay held: the free one goes from one waiter to the next.
        if held.len() > 1 {
            drop(held.pop());
        }
        task.await.unwrap();
    }
    assert_eq!(order.lock()[0], Purpose::Demand);
    drop(held);
    for _ in 0..2 {
        let four = [
            slots.get(party, Purpose::Demand).await,
            slots.get(party, Purpose::Demand).await,
            slots.get(party, Purpose::Demand).await,
            slots.get(party, Purpose::Demand).await,
        ];
        drop(four);
    }
}

/// Guards H4.
#[tokio::test(start_paused = true)]
async fn a_server_that_is_down_is_asked_less_and_less() {
    let origin = Gate::new();
    let mut pauses = Vec::new();
    origin.enter().ok().expect("it works").failed(&Failure::again("down"));
    for _ in 0..10 {
        let since = tokio::time::Instant::now();
        let pass = loop {
            match origin.enter() {
                Ok(pass) => break pass,
                Err(down) => {
                    assert_eq!(down.why.why(), "down");
                    down.over().await;
                }
            }
        };
        assert!(origin.enter().is_err(), "one at a time");
        pauses.push(since.elapsed());
        pass.failed(&Failure::again("down"));
    }
    let milliseconds = |pause: &Duration| pause.as_millis();
    assert!((100..=201).contains(&milliseconds(&pauses[0])), "{pauses:?}");
    assert!((800..=1602).contains(&milliseconds(&pauses[3])), "{pauses:?}");
    assert!((10_000..=20_001).contains(&milliseconds(&pauses[9])), "{pauses:?}");
    // Requests that were under way together fail together, and count as one failure.
    let origin = Gate::new();
    let passes: Vec<_> = (0..10).map(|_| origin.enter().ok().expect("it works")).collect();
    let since = tokio::time::Instant::now();
    for pass in passes {
        pass.failed(&Failure::again("down"));
    }
    let mut pass = loop {
        match origin.enter() {
            Ok(pass) => break pass,
            Err(down) => down.over().await,
        }
    };
    assert!(since.elapsed() <= Duration::from_millis(201), "{:?}", since.elapsed());
    // When one request works, all may continue.
    pass.worked();
    let all: Vec<_> = (0..10).map(|_| origin.enter().ok().expect("it works")).collect();
    drop(all);
    assert_eq!(origin.ready(), None);
}

#[test]
fn addresses_that_are_not_public_are_recognised_in_all_forms() {
    for inside in [
        "127.0.0.1",
        "127.255.255.255",
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "100.127.255.255",
        "192.0.0.1",
        "198.18.0.1",
        "224.0.0.1",
        "239.255.255.255",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:10.0.0.1",
        "::ffff:0:10.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b:1::8.8.8.8",
        "2002:7f00:1::1",
        "2001:0:1:2:3:4:80ff:fffe",
        "fe80::1",
        "febf::1",
        "fec0::1",
        "fc00::1",
        "fdff::1",
        "ff02::1",
        "100::1",
    ] {
        assert!(not_public(inside.parse().unwrap()).is_some(), "{inside}");
    }
    for public in [
        "1.1.1.1",
        "9.255.255.255",
        "11.0.0.1",
        "100.63.0.1",
        "100.128.0.1",
        "126.0.0.1",
        "128.0.0.1",
        "172.15.0.1",
        "172.32.0.1",
        "192.167.0.1",
        "192.169.0.1",
        "223.255.255.255",
        "2606:4700::1",
        "::ffff:8.8.8.8",
        "64:ff9b::8.8.8.8",
        "2002:808:808::1",
    ] {
        assert_eq!(not_public(public.parse().unwrap()), None, "{public}");
    }
}

/// DNS rebinding: each lookup is checked, and of several addresses only the allowed ones are connected to.
/// Guards H9.
#[test]
fn a_name_is_checked_by_the_addresses_that_are_connected_to() {
    let addresses = |texts: &[&str]| -> Vec<IpAddr> { texts.iter().map(|t| t.parse().unwrap()).collect() };
    let allow = AllowList::new(&["10.0.0.0/8".to_owned()]);
    let judge =
        |texts: &[&str]| reachable("images.example", addresses(texts), &allow, Reach::From(Zone::Public));
    assert_eq!(judge(&["8.8.8.8", "127.0.0.1", "::1"]).unwrap(), addresses(&["8.8.8.8"]));
    assert_eq!(judge(&["10.1.1.1", "192.168.0.1"]).unwrap(), addresses(&["10.1.1.1"]));
    let why = judge(&["127.0.0.1", "::1"]).unwrap_err().to_string();
    assert!(why.contains("images.example has the address 127.0.0.1 (loopback)"), "{why}");
    assert!(judge(&[]).unwrap().is_empty());
}

/// A server of a private network sent requests to the metadata service of this machine: its answer, with credentials, was
/// the base.
/// Guards H9.
#[test]
fn a_server_leads_to_its_own_network_and_from_there_to_no_metadata_service() {
    let to = ["8.8.8.8", "10.0.0.1", "fd00::1", "127.0.0.1", "::1", "0.0.0.0", "169.254.169.254", "fe80::1"];
    let metadata =
        ["169.254.170.2", "100.100.100.200", "192.0.0.192", "fd00:ec2::254", "::ffff:169.254.169.254"];
    let allowed = |zone: Zone| -> Vec<&str> {
        let all = to.into_iter().chain(metadata);
        all.filter(|text| Reach::From(zone).refused(not_public(text.parse().unwrap())).is_none()).collect()
    };
    assert_eq!(allowed(Zone::Public), to[..1]);
    assert_eq!(allowed(Zone::Private), to[..3]);
    assert_eq!(allowed(Zone::Loopback), to[..6]);
    let from_link_local = allowed(Zone::LinkLocal);
    assert!(from_link_local.iter().all(|text| !to[3..6].contains(text)), "{from_link_local:?}");
    // Of a name with several addresses, too.
    let found = vec!["169.254.169.254".parse().unwrap(), "10.0.0.1".parse().unwrap()];
    let judge = |allow: &[String]| {
        reachable("images.example", found.clone(), &AllowList::new(allow), Reach::From(Zone::Private))
    };
    assert_eq!(judge(&[]).unwrap(), found[1..]);
    assert_eq!(judge(&["169.254.0.0/16".to_owned()]).unwrap(), found);
}

/// The state of each server was kept for ever.
#[test]
fn states_of_servers_are_bounded() {
    let mut origins = super::Origins::default();
    let held = origins.get("http://held:80");
    for number in 0..100_000 {
        let gate = origins.get(&format!("http://host-{number}:80"));
        gate.enter().ok().expect("a new one").failed(&Failure::again("dead"));
    }
    assert!(origins.states.len() <= super::MOST_ORIGINS + 1, "{}", origins.states.len());
    assert!(Arc::ptr_eq(&held, &origins.get("http://held:80")), "a state that a request holds is kept");
    assert!(origins.get("http://host-99999:80").ready().is_some(), "the state that was used last is kept");
}

/// Sixteen requests to a server that hangs held all slots: another base had none.
/// Guards H7.
#[tokio::test(start_paused = true)]
async fn a_base_that_holds_all_slots_keeps_none_from_another() {
    let slots = Slots::new(4);
    let (hog, other) = (Party::new(), Party::new());
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(slots.get(hog, Purpose::Demand).await);
    }
    let second = Duration::from_secs(1);
    assert!(tokio::time::timeout(second, slots.get(hog, Purpose::Demand)).await.is_err());
    // It gets one at once although none is free, and the next free one before waiters that came earlier.
    let first = tokio::time::timeout(second, slots.get(other, Purpose::Demand)).await.expect("at once");
    let order = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let wait_for = |party: Party, name: &'static str| {
        let (slots, order) = (slots.clone(), order.clone());
        tokio::spawn(async move {
            let slot = slots.get(party, Purpose::Demand).await;
            order.lock().push(name);
            tokio::time::sleep(second).await;
            drop(slot);
        })
    };
    let mut tasks = vec![wait_for(hog, "hog")];
    tokio::task::yield_now().await;
    tasks.push(wait_for(other, "other"));
    tokio::task::yield_now().await;
    // Five of four slots are held: the first that comes back is not free.
    drop(held.pop());
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert!(order.lock().is_empty());
    drop(held.pop());
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(*order.lock(), ["other"]);
    drop((first, held));
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(*order.lock(), ["other", "hog"]);
}
