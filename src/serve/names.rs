//! Changes of names: making, removing and renaming disks, each committed with the request that asked for it.
//!
//! What must hold: such a request may be sent again, to a worker that has not seen the first try. The store says what
//! that try has done, and it is not done twice. None of this runs on a thread of the frontend, because one change of
//! names waits for another.

use std::sync::Arc;

use super::error::fail;
use super::pool::Lane;
use super::{Errno, Handle, Service, guard, open_disk, refuse};
use crate::format::record::MountRequest;
use crate::store::{Attributes, DiskNode, NewDisk, Replace, StoreError};

/// Who asks for a change, and how.
#[derive(Debug, Clone, Copy)]
pub struct Asker {
    pub uid: u32,
    pub gid: u32,
    /// The request; the same number when it is sent again.
    pub request: MountRequest,
    /// Whether it is sent again: another worker may have carried it out.
    pub resent: bool,
    /// Whether a disk that exists already is an error.
    pub exclusive: bool,
}

/// A disk that was made, or found in its place.
#[derive(Debug, Clone)]
pub struct Created {
    /// Its number.
    pub disk: u64,
    pub attributes: Attributes,
}

impl Service {
    /// Makes a blank disk of 0 bytes, as mknod(2) does a file.
    pub fn create(
        &self,
        asker: Asker,
        name: String,
        mode: u32,
        answer: impl FnOnce(Result<Created, Errno>) + Send + 'static,
    ) {
        self.change_names(answer, refuse, move |service, answer| {
            let made = guard::once(asker.resent, || service.make(&asker, &name, mode));
            answer(made.and_then(|node| service.created(&node)));
        });
    }

    /// Makes a disk and opens it, as creat(2) does a file.
    pub fn create_open(
        &self,
        asker: Asker,
        name: String,
        mode: u32,
        answer: impl FnOnce(Result<(Created, Handle), Errno>) + Send + 'static,
    ) {
        self.change_names(answer, refuse, move |service, answer| {
            let made = guard::once(asker.resent, || service.make(&asker, &name, mode));
            answer(made.and_then(|node| {
                let handle = open_disk(&node)?;
                Ok((service.created(&node)?, handle))
            }));
        });
    }

    /// Takes the name from a disk. Its files go with its last user ([`Service::purge`]).
    pub fn unlink(
        &self,
        asker: Asker,
        name: String,
        answer: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        self.change_names(answer, refuse, move |service, answer| {
            answer(guard::once(asker.resent, || {
                if service.done_before(&asker).is_some() {
                    return Ok(());
                }
                match service.store.unlink_for(&name, Some(asker.request)) {
                    Ok(_) => Ok(()),
                    // Of a worker of a version that did not note its requests.
                    Err(StoreError::NotFound { .. }) if asker.resent => Ok(()),
                    Err(error) => Err(fail(&error)),
                }
            }));
        });
    }

    /// Gives a disk another name.
    pub fn rename(
        &self,
        asker: Asker,
        from: String,
        to: String,
        over: Replace,
        answer: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        self.change_names(answer, refuse, move |service, answer| {
            answer(guard::once(asker.resent, || {
                if service.done_before(&asker).is_some() {
                    return Ok(());
                }
                match service.store.rename_for(&from, &to, over, Some(asker.request)) {
                    Ok(_) => Ok(()),
                    // Of a worker of a version that did not note its requests.
                    Err(StoreError::NotFound { .. }) if asker.resent && service.store.disk(&to).is_ok() => {
                        Ok(())
                    }
                    Err(error) => Err(fail(&error)),
                }
            }));
        });
    }

    fn change_names<A: Send + 'static>(
        &self,
        answer: A,
        refuse: impl FnOnce(A, Errno) + Send + 'static,
        job: impl FnOnce(&Self, A) + Send + 'static,
    ) {
        let service = self.clone();
        self.runner.change_in(Lane::Names, answer, refuse, move |answer| job(&service, answer));
    }

    fn created(&self, node: &DiskNode) -> Result<Created, Errno> {
        Ok(Created { disk: node.id(), attributes: self.attributes_now(node.id())? })
    }

    /// The disk whose name the first try of a resent request changed. Its names may have been changed since by commands
    /// of the control socket, which do not wait for requests that are sent again.
    fn done_before(&self, asker: &Asker) -> Option<Arc<DiskNode>> {
        if asker.resent { self.store.done_by(asker.request) } else { None }
    }

    /// Finds the disk that the first try of a resent request made, or makes one.
    fn make(&self, asker: &Asker, name: &str, mode: u32) -> Result<Arc<DiskNode>, Errno> {
        let new = NewDisk {
            name: name.into(),
            base: None,
            size: Some(0),
            mode: mode & 0o7777,
            uid: asker.uid,
            gid: asker.gid,
        };
        if let Some(made) = self.done_before(asker) {
            return Ok(made);
        }
        match self.store.create_disks_for(&[new], Some(asker.request)) {
            Ok(mut made) => made.pop().ok_or(Errno::EIO),
            Err(StoreError::Exists { .. }) if !asker.exclusive => self.store.disk(name).map_err(|e| fail(&e)),
            Err(error) => Err(fail(&error)),
        }
    }
}
