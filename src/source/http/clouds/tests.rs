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
}

impl Credentials for Keystone {
    fn get(&self, _name: SecretName) -> Result<Secret, String> {
        let number = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        if *self.down.lock() {
            return Err("keystone is down".into());
        }
        let none = || Err("none".to_owned());
        let token = format!("token-{number}");
        let session = Session { token, life: LIFE, image: none(), object_store: none() };
        Ok(Secret::new(serde_json::to_vec(&session).unwrap()))
    }
}

fn cloud() -> (Arc<Keystone>, Arc<CloudTokens>) {
    let keystone = Arc::new(Keystone { asked: AtomicUsize::new(0), down: Mutex::new(false) });
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
