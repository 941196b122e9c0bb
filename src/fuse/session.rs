//! Serves the kernel's requests on a descriptor that another process mounted. Every worker starts this way.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use fuser::{Config, Session, SessionACL};

use super::PlyFs;
use super::kernel::{KernelNotifier, synthetic_init};
use crate::io::{interrupts, sys};

/// A session that is ready to run.
pub struct FuseSession {
    session: Session<PlyFs>,
    resends: bool,
}

/// Interrupts are taken out while this exists.
struct InterruptGuard;

impl Drop for InterruptGuard {
    fn drop(&mut self) {
        interrupts::clear_listener();
    }
}

impl FuseSession {
    /// Takes over `fuse`. The supervisor has answered its FUSE_INIT.
    ///
    /// # Errors
    /// When there are too few descriptors.
    pub fn new(fs: PlyFs, fuse: &OwnedFd, threads: usize) -> io::Result<Self> {
        let (ours, theirs) = sys::message_pair()?;
        sys::write(ours.as_fd(), &synthetic_init())?;
        let mut config = Config::default();
        config.n_threads = Some(threads);
        config.acl = SessionACL::All;
        let (service, frontend) = (fs.service.clone(), fs.frontend);
        let resends = fs.protocol.resend;
        let session = Session::from_fd(fs, theirs, SessionACL::All, config)?;
        // The crate's answer to the synthetic request is dropped.
        let mut answer = [0; 256];
        sys::read(ours.as_fd(), &mut answer)?;
        sys::replace_fd(fuse.as_fd(), session.as_fd().as_raw_fd())?;
        if !interrupts::is_linked() {
            tracing::warn!(
                "the program was linked without build.rs, so interrupts are not seen: a killed process waits for its base's server"
            );
        }
        interrupts::set_listener(session.as_fd(), move |unique| service.interrupt(frontend.request(unique)));
        Ok(Self { session, resends })
    }

    /// Makes the kernel send the requests of a dead worker again, where it can, then serves until the mount is gone.
    ///
    /// # Errors
    /// Errors of the device.
    pub fn run(self, notifier: &KernelNotifier) -> io::Result<()> {
        if self.resends
            && let Err(error) = notifier.resend()
        {
            tracing::warn!(%error, "the kernel cannot send the requests of an earlier worker again");
        }
        let _interrupts = InterruptGuard;
        self.session.run()
    }
}
