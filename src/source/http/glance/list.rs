//! The list of the images of a cloud, page by page.
//!
//! What must hold: a list is complete or an error. A page names the next one, and that place is not trusted: the next
//! page is asked for by the last image of this one.

use std::collections::HashSet;

use reqwest::{StatusCode, Url};

use super::{Image, parse, refuse, refused};
use crate::source::SourceError;
use crate::source::http::answer::Failure;
use crate::source::http::clouds::CloudAuthoriser;
use crate::source::http::{CORRECT, Http, failed};
use crate::source::openstack::{ImagePage, ImagePlace, ImageRecord, Whereabouts};

/// Images of a page. Records have a few KiB, and a page at most [`super::MAX_RECORD`].
const PAGE: &str = "50";
/// Most images of a cloud.
const MOST: usize = 20_000;

impl Http {
    /// The records of the active images that the user of a cloud may see, the hidden ones too.
    ///
    /// # Errors
    /// `Denied`, `Protocol` or `Unreachable`.
    pub async fn list_images(&self, cloud: &str) -> Result<Vec<ImageRecord>, SourceError> {
        let shown = format!("the list of images of cloud {cloud}");
        let fail = |failure: &Failure| failed(&shown, failure);
        let tokens = self.services.clouds.find(cloud).map_err(|why| refuse(&shown, why))?;
        if let Some(problem) = &self.problem {
            return Err(fail(&Failure::advised(problem, CORRECT)));
        }
        let place = ImagePlace { glance: Whereabouts::Of(cloud.to_owned()), image: String::new() };
        let glance = Image { place, tokens: Some(CloudAuthoriser(tokens)) };
        let mut images: Vec<ImageRecord> = Vec::new();
        for hidden in ["false", "true"] {
            glance.add_pages(self, hidden, &mut images).await.map_err(|failure| fail(&failure))?;
        }
        let mut seen = HashSet::new();
        images.retain(|image| image.unreadable().is_none() && seen.insert(image.id.clone()));
        Ok(images)
    }
}

impl Image {
    async fn add_pages(
        &self,
        http: &Http,
        hidden: &str,
        images: &mut Vec<ImageRecord>,
    ) -> Result<(), Failure> {
        let (glance, reach) = self.endpoint(http).await?;
        let mut marker: Option<String> = None;
        loop {
            let url = page_url(&glance, hidden, marker.as_deref())?;
            let (status, headers, body) = self.get(http, &url, reach).await?;
            if status != StatusCode::OK {
                return Err(refused("the list of images", status, &headers));
            }
            let page = ImagePage::parse(&body).map_err(Failure::Protocol)?;
            let last = page.images.last().map(|image| image.id.clone());
            images.extend(page.images);
            if page.next.is_none() {
                return Ok(());
            }
            if last.is_none() || last <= marker {
                return Err(Failure::Protocol("the pages of the list of images do not go on".into()));
            }
            if images.len() > MOST {
                return Err(Failure::Protocol(format!("it lists more than {MOST} images")));
            }
            marker = last;
        }
    }
}

/// The URL of a page. The list is by ID, because an image that comes or goes meanwhile then moves no other to another page.
fn page_url(glance: &str, hidden: &str, marker: Option<&str>) -> Result<Url, Failure> {
    let mut url = parse(&format!("{glance}/v2/images"))?;
    let wanted = [("status", "active"), ("os_hidden", hidden), ("sort", "id:asc"), ("limit", PAGE)];
    url.query_pairs_mut().extend_pairs(wanted).extend_pairs(marker.map(|marker| ("marker", marker)));
    Ok(url)
}
