//! Creates, removes and renames disks. Each change is committed together with the request that asked for it.
//!
//! What must hold: such a request may be sent again to a worker that has not seen the first attempt. The store knows
//! whether that attempt was carried out, and it is not carried out twice. These changes never run on a thread of the
//! frontend, because they wait for each other.

use std::sync::Arc;

use super::error::fail;
use super::pool::Lane;
use super::{Errno, Handle, Service, guard, open_disk, refuse};
use crate::format::limits::Limits;
use crate::format::record::MountRequest;
use crate::store::{Attributes, DiskNode, NewDisk, Replace, StoreError};

/// The requester of a change, and its request.
#[derive(Debug, Clone, Copy)]
pub struct Requester {
    pub uid: u32,
    pub gid: u32,
    /// The request. It has the same number when it is sent again.
    pub request: MountRequest,
    /// Whether the request is sent again: another worker may have carried it out.
    pub resent: bool,
    /// Whether a disk that exists already is an error.
    pub exclusive: bool,
}

/// A disk that was created, or that existed.
#[derive(Debug, Clone)]
pub struct CreatedDisk {
    /// Its number.
    pub disk: u64,
    pub attributes: Attributes,
}

impl Service {
    /// Creates a blank disk of 0 bytes, as mknod(2) creates a file.
    pub fn create(
        &self,
        requester: Requester,
        name: String,
        mode: u32,
        answer: impl FnOnce(Result<CreatedDisk, Errno>) + Send + 'static,
    ) {
        self.change_names(answer, refuse, move |service, answer| {
            let made = guard::once(requester.resent, || service.make(&requester, &name, mode));
            answer(made.and_then(|node| service.created(&node)));
        });
    }

    /// Creates a disk and opens it, as creat(2) does a file.
    pub fn create_open(
        &self,
        requester: Requester,
        name: String,
        mode: u32,
        answer: impl FnOnce(Result<(CreatedDisk, Handle), Errno>) + Send + 'static,
    ) {
        self.change_names(answer, refuse, move |service, answer| {
            let made = guard::once(requester.resent, || service.make(&requester, &name, mode));
            answer(made.and_then(|node| {
                let handle = open_disk(&node)?;
                Ok((service.created(&node)?, handle))
            }));
        });
    }

    /// Takes the name from a disk. Its files go with its last user ([`Service::purge`]).
    pub fn unlink(
        &self,
        requester: Requester,
        name: String,
        answer: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        self.change_names(answer, refuse, move |service, answer| {
            answer(guard::once(requester.resent, || {
                if service.done_before(&requester).is_some() {
                    return Ok(());
                }
                match service.store.unlink_for(&name, Some(requester.request)) {
                    Ok(_) => Ok(()),
                    // An earlier version may have done it, which did not note its requests.
                    Err(StoreError::NotFound { .. }) if requester.resent => Ok(()),
                    Err(error) => Err(fail(&error)),
                }
            }));
        });
    }

    /// Renames a disk.
    pub fn rename(
        &self,
        requester: Requester,
        from: String,
        to: String,
        over: Replace,
        answer: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        self.change_names(answer, refuse, move |service, answer| {
            answer(guard::once(requester.resent, || {
                if service.done_before(&requester).is_some() {
                    return Ok(());
                }
                match service.store.rename_for(&from, &to, over, Some(requester.request)) {
                    Ok(_) => Ok(()),
                    // An earlier version may have done it, which did not note its requests.
                    Err(StoreError::NotFound { .. })
                        if requester.resent && service.store.disk(&to).is_ok() =>
                    {
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

    fn created(&self, node: &DiskNode) -> Result<CreatedDisk, Errno> {
        Ok(CreatedDisk { disk: node.id(), attributes: self.attributes_now(node.id())? })
    }

    /// The disk whose name the first attempt of a resent request changed. Commands of the control socket do not wait
    /// for resent requests, and may have changed names since.
    fn done_before(&self, requester: &Requester) -> Option<Arc<DiskNode>> {
        if requester.resent { self.store.done_by(requester.request) } else { None }
    }

    /// Finds the disk that the first attempt of a resent request created, or creates one.
    fn make(&self, requester: &Requester, name: &str, mode: u32) -> Result<Arc<DiskNode>, Errno> {
        let new = NewDisk {
            name: name.into(),
            base: None,
            size: Some(0),
            // A disk has the secrets of a guest: like `disk create`, and whatever the umask is.
            mode: mode & 0o600,
            uid: requester.uid,
            gid: requester.gid,
            limits: Limits::default(),
        };
        if let Some(made) = self.done_before(requester) {
            return Ok(made);
        }
        match self.store.create_disks_for(&[new], Some(requester.request)) {
            Ok(mut made) => made.pop().ok_or(Errno::EIO),
            Err(StoreError::Exists { .. }) if !requester.exclusive => {
                self.store.disk(name).map_err(|e| fail(&e))
            }
            Err(error) => Err(fail(&error)),
        }
    }
}
