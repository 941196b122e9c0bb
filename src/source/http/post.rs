//! Sends a body to a server that the operator named, with the credentials of its URL.

use std::sync::Arc;
use std::time::Duration;

use reqwest::Method;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use tokio::time::timeout;

use super::address::Reach;
use super::answer::Failure;
use super::authorise::{Refusal, Unsigned};
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
            let authoriser = self.keyring.find(&url);
            let grant = match &authoriser {
                Some(authoriser) => {
                    Some(authoriser.lend(self, &url).await.map_err(|failure| failure.why().to_owned())?)
                }
                None => None,
            };
            let mut headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(media))]);
            if let Some(grant) = &grant {
                let request = Unsigned { method: &Method::POST, url: &url };
                let signed = grant.sign(&request).map_err(|failure| failure.why().to_owned())?;
                headers.extend(signed);
            }
            let request =
                self.clients.choose(&url, Reach::Anywhere).post(url.clone()).headers(headers).body(body);
            let response = request.send().await.map_err(|error| words(&error))?;
            let status = response.status();
            if status.is_success() {
                return Ok(());
            }
            if let Some((authoriser, grant)) = authoriser.zip(grant) {
                // The next attempt has new ones.
                let (headers, failure) = (response.headers(), &Failure::again(""));
                let refusal = Refusal { url: &url, status: status.as_u16(), headers, text: &[], failure };
                authoriser.refused(self, &*grant, refusal).await;
            }
            Err(format!("it answers {status}"))
        };
        match timeout(TIMEOUT, send).await {
            Ok(sent) => sent.map_err(|why| format!("{}: {why}", shown(to))),
            Err(_) => Err(format!("{}: it does not answer within {TIMEOUT:?}", shown(to))),
        }
    }
}
