//! The socket of metrics of one worker. Each worker binds it before it gives up that right; where another program has the
//! address, it starts a helper that waits for it.
//!
//! What must hold: without metrics disks are served as with them.

use crate::config::Config;
use crate::control::WaitForAddress;
use crate::control::metrics::listen::{MetricsSocket, listen};
use crate::sandbox::binder::Binder;

/// Binds the address, when the configuration has one. The caller is the only thread.
pub fn bind(config: &Config) -> Option<MetricsSocket> {
    let address = config.metrics.address()?;
    let wait = || {
        let binder = Binder::start(move || listen(address))?;
        Ok(Box::new(move || binder.wait()) as WaitForAddress)
    };
    let socket = MetricsSocket::bind(address, wait);
    socket
        .inspect_err(|error| {
            tracing::error!(%error, %address, "cannot wait until the address of [metrics] listen is free; metrics are not served; restart the daemon");
        })
        .ok()
}
