//! Serving the kernel's requests on a descriptor that somebody else mounted: how every worker starts.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use fuser::{Config, Session, SessionACL};

use super::PlyFs;
use super::kernel::{KernelNotifier, synthetic_init};
use crate::io::{interrupts, sys};

/// A session that is ready to run.
pub struct Serving {
    session: Session<PlyFs>,
    resends: bool,
}

/// Interrupts are heard as long as this is there.
struct Hearing;

impl Drop for Hearing {
    fn drop(&mut self) {
        interrupts::hear_no_more();
    }
}

impl Serving {
    /// Takes over `fuse`, whose FUSE_INIT was answered by the supervisor.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn new(fs: PlyFs, fuse: &OwnedFd, threads: usize) -> io::Result<Self> {
        let (ours, theirs) = sys::message_pair()?;
        sys::write(ours.as_fd(), &synthetic_init())?;
        let mut config = Config::default();
        config.n_threads = Some(threads);
        config.acl = SessionACL::All;
        let service = fs.service.clone();
        let resends = fs.protocol.resend;
        let session = Session::from_fd(fs, theirs, SessionACL::All, config)?;
        // The crate's answer to the synthetic request means nothing.
        let mut answer = [0; 256];
        sys::read(ours.as_fd(), &mut answer)?;
        sys::replace_fd(fuse.as_fd(), session.as_fd().as_raw_fd())?;
        if !interrupts::are_seen() {
            tracing::warn!(
                "the program was linked without build.rs: a killed process waits for its base's server"
            );
        }
        interrupts::hear(session.as_fd(), move |unique| service.interrupt(unique));
        Ok(Self { session, resends })
    }

    /// Has requests of a dead worker sent again, where the kernel can, then serves until the mount is gone. Its threads have this thread's nice
    /// value.
    ///
    /// # Errors
    /// What the device says.
    pub fn run(self, notifier: &KernelNotifier) -> io::Result<()> {
        if self.resends
            && let Err(error) = notifier.resend()
        {
            tracing::warn!(%error, "the kernel cannot send requests again");
        }
        let _hearing = Hearing;
        self.session.run()
    }
}
