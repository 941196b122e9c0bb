//! The listening socket for other hosts. The supervisor binds it once, as that of the status page.
//!
//! What must hold: without it disks are served as with it. So a socket that cannot be bound is a line in the log.

use std::net::TcpListener;
use std::os::fd::OwnedFd;

use crate::config::Config;

/// Binds the socket, when the configuration has one.
pub fn listen(config: &Config) -> Option<OwnedFd> {
    // The configuration is validated.
    let address = config.export.address().ok().flatten()?;
    match TcpListener::bind(address) {
        Ok(socket) => {
            tracing::info!(%address, "cached blocks of bases are served to other hosts");
            Some(socket.into())
        }
        Err(error) => {
            tracing::error!(
                %address,
                %error,
                "cannot listen for other hosts; disks are served without it; free the address or change [export] http, \
                 and restart the daemon"
            );
            None
        }
    }
}
