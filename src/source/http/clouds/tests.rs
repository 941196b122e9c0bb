use std::sync::atomic::AtomicUsize;

use parking_lot::Mutex;
use tokio::time::advance;

use super::*;
use crate::source::http::Secret;

const LIFE: Duration = Duration::from_secs(100);

/// Counts how often it is asked.
struct Keystone {
    asked: AtomicUsize,
    down: Mutex<bool>,
    life: Mutex<Duration>,
    hangs: AtomicBool,
    /// How long it takes to answer.
    takes: Mutex<Duration>,
}

impl Credentials for Keystone {
    fn get(&self, _name: SecretName) -> Result<Secret, String> {
        let number = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        while self.hangs.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let takes = *self.takes.lock();
        if !takes.is_zero() {
            std::thread::sleep(takes);
        }
        if *self.down.lock() {
            return Err("keystone is down".into());
        }
        let none = || Err("none".to_owned());
        let token = format!("token-{number}");
        let session = Session { token, life: *self.life.lock(), image: none(), object_store: none() };
        Ok(Secret::new(serde_json::to_vec(&session).unwrap()))
    }
}

fn cloud() -> (Arc<Keystone>, Arc<CloudTokens>) {
    let keystone = Arc::new(Keystone {
        asked: AtomicUsize::new(0),
        down: Mutex::new(false),
        hangs: AtomicBool::new(false),
        life: Mutex::new(LIFE),
        takes: Mutex::new(Duration::ZERO),
    });
    let reader: Arc<dyn Credentials> = keystone.clone();
    let config = CloudConfig { name: "c".into(), file: "/clouds.yaml".into(), locations: Vec::new() };
    let clouds = Clouds::new(&[config], &reader);
    (keystone, clouds.find("c").unwrap())
}

async fn token(cloud: &Arc<CloudTokens>) -> Result<String, String> {
    let held = cloud.current().await.map_err(|failure| failure.why().to_owned())?;
    Ok(held.session.token.clone())
}

#[tokio::test(start_paused = true)]
async fn a_token_is_renewed_before_it_ends_while_requests_go_on_with_the_old_one() {
    let (keystone, cloud) = cloud();
    assert_eq!(token(&cloud).await.unwrap(), "token-1");
    advance(Duration::from_secs(79)).await;
    assert_eq!(token(&cloud).await.unwrap(), "token-1");
    assert_eq!(keystone.asked.load(Ordering::SeqCst), 1);
    advance(Duration::from_secs(2)).await;
    assert_eq!(token(&cloud).await.unwrap(), "token-1", "the request does not wait for the new one");
    while token(&cloud).await.unwrap() == "token-1" {
        tokio::task::yield_now().await;
    }
    assert_eq!(token(&cloud).await.unwrap(), "token-2");
    assert_eq!(keystone.asked.load(Ordering::SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn a_token_is_used_until_its_end_when_keystone_is_down_and_no_longer() {
    let (keystone, cloud) = cloud();
    assert_eq!(token(&cloud).await.unwrap(), "token-1");
    *keystone.down.lock() = true;
    advance(Duration::from_secs(90)).await;
    assert_eq!(token(&cloud).await.unwrap(), "token-1");
    advance(Duration::from_secs(11)).await;
    assert_eq!(token(&cloud).await.unwrap_err(), "a token of cloud c: keystone is down");
    *keystone.down.lock() = false;
    assert!(token(&cloud).await.unwrap() != "token-1");
}

#[tokio::test(start_paused = true)]
async fn waiting_requests_share_one_new_token() {
    let (keystone, cloud) = cloud();
    let all: Vec<_> = (0..20)
        .map(|_| {
            tokio::spawn({
                let cloud = cloud.clone();
                async move { token(&cloud).await }
            })
        })
        .collect();
    for one in all {
        assert_eq!(one.await.unwrap().unwrap(), "token-1");
    }
    assert_eq!(keystone.asked.load(Ordering::SeqCst), 1);
}

/// Guards H13.
#[tokio::test(start_paused = true)]
async fn a_keystone_that_is_down_is_asked_once_a_second_however_many_tokens_are_refused() {
    let (keystone, cloud) = cloud();
    let refused = cloud.current().await.unwrap_or_else(|_| panic!("a token"));
    advance(Duration::from_secs(2)).await;
    *keystone.down.lock() = true;
    let (begin, before) = (Instant::now(), keystone.asked.load(Ordering::SeqCst));
    for _ in 0..5 {
        assert!(cloud.renew(&refused).await.is_err());
    }
    let asked = keystone.asked.load(Ordering::SeqCst) - before;
    assert!(begin.elapsed() >= AGAIN * (asked as u32 - 1), "{asked} requests in {:?}", begin.elapsed());
}

/// Guards H13.
#[tokio::test(start_paused = true)]
async fn tokens_that_end_at_once_are_asked_for_once_a_second() {
    let (keystone, cloud) = cloud();
    *keystone.life.lock() = Duration::from_millis(1);
    let begin = Instant::now();
    for _ in 0..5 {
        assert!(token(&cloud).await.is_ok());
        advance(Duration::from_millis(2)).await;
    }
    let asked = keystone.asked.load(Ordering::SeqCst);
    assert!(begin.elapsed() >= AGAIN * (asked as u32 - 1), "{asked} requests in {:?}", begin.elapsed());
}

/// A read with a deadline gives up before a slow keystone has answered.
#[tokio::test]
async fn a_token_that_takes_longer_than_a_request_waits_serves_the_next_one() {
    let (keystone, cloud) = cloud();
    *keystone.takes.lock() = Duration::from_millis(400);
    let begin = Instant::now();
    let token = loop {
        match timeout(Duration::from_millis(50), token(&cloud)).await {
            Ok(found) => break found.unwrap(),
            Err(_) => assert!(begin.elapsed() < Duration::from_secs(20), "no token comes"),
        }
    };
    assert_eq!((&*token, keystone.asked.load(Ordering::SeqCst)), ("token-1", 1));
}

/// Guards H13.
#[tokio::test]
async fn a_request_with_a_valid_token_does_not_wait_for_a_keystone_that_hangs() {
    let (keystone, cloud) = cloud();
    assert_eq!(token(&cloud).await.unwrap(), "token-1");
    // A service of the cloud refuses the token, and others accept it.
    let mut refused = cloud.current().await.unwrap_or_else(|_| panic!("a token"));
    refused.since = Instant::now() - AGAIN * 2;
    *keystone.takes.lock() = Duration::from_secs(3);
    let renewing = tokio::spawn({
        let cloud = cloud.clone();
        async move { cloud.renew(&refused).await.is_ok() }
    });
    while keystone.asked.load(Ordering::SeqCst) < 2 {
        tokio::task::yield_now().await;
    }
    assert_eq!(timeout(AGAIN, token(&cloud)).await.expect("at once").unwrap(), "token-1");
    assert!(renewing.await.unwrap());
    assert_eq!(token(&cloud).await.unwrap(), "token-2");
}

/// Readahead has no deadline before it has failed, and readers wait for what it fetches.
#[tokio::test(start_paused = true)]
async fn a_secret_that_never_comes_is_an_error_and_keeps_one_thread() {
    let (keystone, cloud) = cloud();
    keystone.hangs.store(true, Ordering::SeqCst);
    for _ in 0..3 {
        let waiting = tokio::spawn({
            let cloud = cloud.clone();
            async move { token(&cloud).await }
        });
        // The thread that hangs keeps the clock from going by itself.
        for _ in 0..30 {
            advance(Duration::from_secs(1)).await;
            tokio::task::yield_now().await;
        }
        assert!(waiting.is_finished(), "it waits for ever");
        let why = waiting.await.unwrap().unwrap_err();
        assert!(why.contains("have not come for 15s"), "{why}");
    }
    assert!(keystone.asked.load(Ordering::SeqCst) <= 1);
    keystone.hangs.store(false, Ordering::SeqCst);
    assert!(token(&cloud).await.is_ok());
}
