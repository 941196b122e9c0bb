//! Sends a body to a server that the operator named, with the credentials of its URL.

use std::sync::Arc;
use std::time::Duration;

use reqwest::header::CONTENT_TYPE;
use tokio::time::timeout;

use super::address::Reach;
use super::{AbortOnDrop, Http, shown, url, words};

/// How long the server may take.
const TIMEOUT: Duration = Duration::from_secs(10);

impl Http {
    /// Sends `body` to `to` by POST. It does not follow redirects.
    ///
    /// # Errors
    /// Why the server did not accept it, without secrets.
    pub async fn post(self: &Arc<Self>, to: &str, media: &'static str, body: Vec<u8>) -> Result<(), String> {
        let (this, to) = (self.clone(), to.to_owned());
        // The connections of the client belong to its own runtime.
        let mut task = AbortOnDrop(self.runtime.spawn(async move { this.post_here(&to, media, body).await }));
        (&mut task.0).await.unwrap_or_else(|_| Err("the request was cancelled".into()))
    }

    async fn post_here(&self, to: &str, media: &'static str, body: Vec<u8>) -> Result<(), String> {
        let url = url::parse(to).map_err(|error| error.to_string())?;
        let send = async {
            let lent = self.keyring.lend(&url).await.map_err(|failure| failure.why().to_owned())?;
            let request = self.clients.choose(&url, Reach::Anywhere).post(url.clone());
            let mut request = request.header(CONTENT_TYPE, media).body(body);
            if let Some(lent) = &lent {
                request = request.headers(lent.headers.clone());
            }
            let status = request.send().await.map_err(|error| words(&error))?.status();
            if let (401 | 403, Some(lent)) = (status.as_u16(), &lent) {
                // The next attempt has new ones.
                self.keyring.renew(lent).await;
            }
            if status.is_success() { Ok(()) } else { Err(format!("it answers {status}")) }
        };
        match timeout(TIMEOUT, send).await {
            Ok(sent) => sent.map_err(|why| format!("{}: {why}", shown(to))),
            Err(_) => Err(format!("{}: it does not answer within {TIMEOUT:?}", shown(to))),
        }
    }
}
