//! Signs requests for the objects of buckets (SigV4), and finds out the region of a bucket.

use std::any::Any;
use std::collections::HashMap;
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll, Waker};

use parking_lot::Mutex;
use reqsign_aws_v4::RequestSigner;
use reqsign_core::{Context, SignRequest};
use reqwest::Url;
use reqwest::header::{HOST, HeaderMap};

use super::errors::{ServiceError, failure};
use super::keys::{Keys, Lent};
use super::place::{FIRST_REGION, Object, Service, is_version};
use crate::config::{HttpConfig, S3Config};
use crate::source::SourceError;
use crate::source::http::{
    Authoriser, Credentials, Failure, Grant, Http, Job, Located, Refusal, Remedy, Unsigned, shown,
};

/// The services of the configuration.
pub(in crate::source) struct Services {
    entries: Vec<(S3Config, Option<Arc<Keys>>)>,
    /// The regions that buckets turned out to be in.
    regions: Arc<Mutex<HashMap<String, String>>>,
}

impl Services {
    pub fn new(config: &HttpConfig, reader: &Arc<dyn Credentials>) -> Self {
        let entry = |(number, entry): (usize, &S3Config)| {
            (entry.clone(), Keys::new(entry, number, reader).map(Arc::new))
        };
        Self { entries: config.s3.iter().enumerate().map(entry).collect(), regions: Arc::default() }
    }

    /// Where the object of an `s3://` URL is. `version` is the one that was registered, unless the URL names one.
    pub fn locate(&self, text: &str, version: Option<&str>) -> Result<Located, SourceError> {
        let object = Object::parse(text)?;
        let fitting = self.entries.iter().filter_map(|entry| Some((entry.0.fits(&object.bucket)?, entry)));
        let entry = fitting.max_by_key(|(length, _)| *length).map(|(_, entry)| entry);
        let service = Service::new(entry.map(|(config, _)| config))?;
        let pinned = version.filter(|version| is_version(version)).map(str::to_owned);
        let version = object.version.clone().or(pinned);
        let given = entry.and_then(|(config, _)| config.region.clone());
        let bucket = Bucket {
            keys: entry.and_then(|(_, keys)| keys.clone()),
            region: given.unwrap_or_else(|| FIRST_REGION.to_owned()),
            regions: self.regions.clone(),
            version,
            service,
            object,
        };
        let url = bucket.service.url(&bucket.object, bucket.version.as_deref(), &bucket.region())?;
        Ok(Located { url, shown: shown(text), authoriser: Some(Arc::new(bucket)) })
    }
}

/// Who signs requests for one object.
struct Bucket {
    service: Service,
    object: Object,
    version: Option<String>,
    /// None of a public bucket.
    keys: Option<Arc<Keys>>,
    /// As configured.
    region: String,
    regions: Arc<Mutex<HashMap<String, String>>>,
}

impl Bucket {
    fn region(&self) -> String {
        self.regions.lock().get(&self.object.bucket).unwrap_or(&self.region).clone()
    }

    /// The bucket is in another region than that of the request to `from`, which failed.
    fn moved(&self, region: &str, from: &Url, failure: Failure) -> Remedy {
        if region != self.region() {
            let bucket = &self.object.bucket;
            tracing::info!(
                bucket,
                region,
                configured = self.region,
                "a bucket is in another region than configured; set region in [[http.s3]]"
            );
            self.regions.lock().insert(bucket.clone(), region.to_owned());
        }
        if !self.service.is_amazon() {
            return Remedy::Renewed(failure);
        }
        match self.service.url(&self.object, self.version.as_deref(), region) {
            Ok(url) if url != *from => Remedy::Elsewhere(url),
            _ => Remedy::Renewed(failure),
        }
    }
}

/// Keys that sign for a region; or none, for a public bucket.
struct Signature {
    lent: Option<Lent>,
    region: String,
}

impl Grant for Signature {
    fn sign(&self, request: &Unsigned<'_>) -> Result<HeaderMap, Failure> {
        let Some(lent) = &self.lent else { return Ok(HeaderMap::new()) };
        let unsigned = || Failure::Protocol("it cannot be signed".into());
        // Only host, date and token are signed: what a proxy may change on the way is left out.
        let plain = http::Request::builder().method(request.method.clone()).uri(request.url.as_str());
        let (mut parts, ()) = plain.body(()).map_err(|_| unsigned())?.into_parts();
        let signer = RequestSigner::new("s3", &self.region);
        let signer = signer.with_standard_session_token();
        let context = Context::new();
        let signing = signer.sign_request(&context, &mut parts, Some(&*lent.keys), None);
        at_once(signing).ok_or_else(unsigned)?.map_err(|_| unsigned())?;
        let mut headers = parts.headers;
        // The client adds it.
        headers.remove(HOST);
        for value in headers.values_mut() {
            value.set_sensitive(true);
        }
        Ok(headers)
    }

    fn as_any(&self) -> &(dyn Any + Send + Sync) {
        self
    }
}

/// The result of work that waits for nothing.
fn at_once<T>(work: impl Future<Output = T>) -> Option<T> {
    match pin!(work).poll(&mut TaskContext::from_waker(Waker::noop())) {
        Poll::Ready(done) => Some(done),
        Poll::Pending => None,
    }
}

impl Authoriser for Bucket {
    fn covers(&self, url: &Url) -> bool {
        self.service.region_of(&self.object.bucket, url, "").is_some()
    }

    fn lend<'a>(&'a self, http: &'a Http, url: &'a Url) -> Job<'a, Result<Box<dyn Grant>, Failure>> {
        Box::pin(async move {
            let lent = match &self.keys {
                Some(keys) => Some(keys.current(http).await?),
                None => None,
            };
            let region = self.service.region_of(&self.object.bucket, url, &self.region());
            let region = region.unwrap_or_else(|| self.region());
            Ok(Box::new(Signature { lent, region }) as Box<dyn Grant>)
        })
    }

    fn refused<'a>(&'a self, http: &'a Http, grant: &'a dyn Grant, refusal: Refusal<'a>) -> Job<'a, Remedy> {
        Box::pin(async move {
            let error = ServiceError::of(refusal.headers, refusal.text);
            let signature = grant.as_any().downcast_ref::<Signature>();
            let lent = signature.and_then(|signature| signature.lent.as_ref());
            let failure = failure(&self.object, &error, &refusal, lent.is_some());
            let used = signature.map(|signature| signature.region.as_str());
            if let Some(region) = &error.region
                && used != Some(region)
                && matches!(refusal.status, 301 | 307 | 400 | 403)
            {
                return self.moved(region, refusal.url, failure);
            }
            if let (Some(keys), Some(lent)) = (&self.keys, lent)
                && error.is_about_keys(refusal.status)
                && keys.renew(http, lent).await
            {
                return Remedy::Renewed(failure);
            }
            Remedy::Fails(failure)
        })
    }
}
