//! The listening socket of the status page. The supervisor binds it once: a confined worker could not, and it must not
//! matter which worker serves. While another program has the TCP address, a helper process of the worker waits for it.
//!
//! What must hold: without the page disks are served as with it. So a socket that cannot be bound is a line in the log.

use std::fs;
use std::io;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use crate::config::{Config, PageAddress};
use crate::control::page::PageSocket;
use crate::io::sys;
use crate::sandbox::binder::Binder;

/// Binds the socket, when the configuration has one. The caller is the only thread.
pub fn listen(config: &Config) -> Option<OwnedFd> {
    // The configuration is validated.
    let address = config.page.address().ok().flatten()?;
    let bound = match &address {
        PageAddress::Tcp(address) => TcpListener::bind(address).map(OwnedFd::from),
        PageAddress::Unix(path) => bind_unix(path),
    };
    let shown = config.page.listen.as_deref().unwrap_or_default();
    match bound {
        Ok(socket) => {
            tracing::info!(listen = shown, "the status page is served");
            Some(socket)
        }
        Err(error) => {
            tracing::error!(
                listen = shown,
                %error,
                "cannot listen for the status page; disks are served without it; free the address or change [page] \
                 listen; plyfs tries a TCP address again, and needs a restart for a socket"
            );
            None
        }
    }
}

/// What waits until another program frees the TCP address of the page, when the supervisor could not bind it. `None` for
/// a Unix socket, whose path must be mended first. The caller is the only thread of a worker.
pub fn wait(config: &Config) -> Option<PageSocket> {
    let PageAddress::Tcp(address) = config.page.address().ok().flatten()? else { return None };
    match Binder::start(move || TcpListener::bind(address).map(OwnedFd::from)) {
        Ok(binder) => Some(PageSocket::Taken(Box::new(move || binder.wait()))),
        Err(error) => {
            tracing::error!(%error, %address, "cannot wait until the address of [page] listen is free; restart the daemon");
            None
        }
    }
}

/// Only root and this user may connect.
fn bind_unix(path: &Path) -> io::Result<OwnedFd> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => fs::remove_file(path)?,
        Ok(_) => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "a file that is no socket is there"));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    // The umask belongs to the process, and only one thread runs here.
    let mask = sys::set_umask(0o177);
    let bound = UnixListener::bind(path);
    sys::set_umask(mask);
    bound.map(OwnedFd::from)
}

/// Removes the name of a Unix socket that this daemon has bound.
pub fn clean_up(config: &Config, is_bound: bool) {
    if let (true, Ok(Some(PageAddress::Unix(path)))) = (is_bound, config.page.address()) {
        let _ = fs::remove_file(path);
    }
}
