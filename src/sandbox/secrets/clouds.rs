//! Tokens of clouds. The helper reads clouds.yaml and asks keystone itself, so that no password or secret of a cloud
//! reaches the worker, which reads images that a stranger may have made.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::runtime::{Builder, Runtime};

use super::{LONGEST, read_at_most};
use crate::config::{CloudConfig, Config};
use crate::source::http::{Http, Network, NoCredentials, Proxies, Secret};
use crate::source::openstack::find;

/// Longest file with clouds.
const MAX_FILE: usize = 256 << 10;

/// The client of keystone.
pub(super) struct Tokens {
    http: Arc<Http>,
    runtime: Runtime,
}

/// What [`Tokens`] needs of the host, read before the helper gives up its rights; none without clouds.
pub(super) fn network(config: &Config) -> Option<Network> {
    let wanted = !config.http.clouds.is_empty();
    wanted.then(|| match config.security.network {
        true => Network::prepare(&config.http, Proxies::from_variables(|name| std::env::var(name).ok())),
        false => Network::off(),
    })
}

/// The directories of the files with clouds.
pub(super) fn dirs(config: &Config) -> impl Iterator<Item = PathBuf> {
    config.http.clouds.iter().filter_map(|cloud| cloud.file.parent().map(Path::to_owned))
}

impl Tokens {
    /// Starts a thread.
    pub fn new(config: &Config, network: &Network) -> Result<Self, String> {
        let runtime = Builder::new_multi_thread().worker_threads(1).thread_name("token").enable_all().build();
        let runtime = runtime.map_err(|error| error.to_string())?;
        let http = Http::new(&config.http, network, Arc::new(NoCredentials), runtime.handle().clone());
        Ok(Self { http: http.map_err(|error| error.to_string())?, runtime })
    }

    /// A token of a cloud, with its endpoints.
    pub fn get(&self, cloud: &CloudConfig) -> Result<Secret, String> {
        let file = text(&cloud.file)?;
        let secure = cloud.secure_file();
        // A cloud need not have one.
        let secure = if secure.exists() { Some(text(&secure)?) } else { None };
        let as_text = |secret: &Secret| {
            String::from_utf8(secret.bytes().to_vec())
                .map(zeroize::Zeroizing::new)
                .map_err(|_| "it is not UTF-8")
        };
        let secure = secure.as_ref().map(as_text).transpose()?;
        let found = find(&as_text(&file)?, secure.as_ref().map(|text| text.as_str()), &cloud.name)?;
        let (http, (send, receive)) = (self.http.clone(), std::sync::mpsc::channel());
        self.runtime.spawn(async move {
            let _ = send.send(http.token(&found).await);
        });
        let session = receive.recv().map_err(|_| "the request was cancelled".to_owned())??;
        let session = Secret::new(serde_json::to_vec(&session).map_err(|error| error.to_string())?);
        match session.bytes().len() {
            0..=LONGEST => Ok(session),
            more => Err(format!("token and endpoints have {more} bytes, at most {LONGEST} are possible")),
        }
    }
}

fn text(path: &Path) -> Result<Secret, String> {
    read_at_most(path, MAX_FILE).map_err(|why| format!("{}: {why}", path.display()))
}
