//! Routes on the clouds of the configuration: which there are, and their images. Passwords stay in the credential helper:
//! a client learns what a cloud has without any.

use axum::Json;
use axum::extract::State;

use super::wire::{Cloud, CloudImage};
use super::{Answer, ApiError, Cause, Control, Name};
use crate::bases::OfferedImage;

/// List the clouds
///
/// The clouds of OpenStack that the configuration names.
#[utoipa::path(
    get,
    path = "/v1/clouds",
    tag = "clouds",
    operation_id = "list_clouds",
    responses((status = 200, description = "The clouds, in the order of the configuration.", body = Vec<Cloud>))
)]
pub(super) async fn list(State(c): State<Control>) -> Answer<Vec<Cloud>> {
    Ok(Json(c.config.http.clouds.iter().map(|cloud| Cloud { name: cloud.name.clone() }).collect()))
}

/// List the images of a cloud
///
/// The daemon asks the cloud's Glance, page by page, for the active images that its user may see, the hidden ones too.
#[utoipa::path(
    get,
    path = "/v1/clouds/{name}/images",
    tag = "clouds",
    operation_id = "list_cloud_images",
    responses((status = 200, description = "All of them, by ID.", body = Vec<CloudImage>))
)]
pub(super) async fn images(State(c): State<Control>, Name(name): Name) -> Answer<Vec<CloudImage>> {
    if !c.config.http.clouds.iter().any(|cloud| cloud.name == name) {
        let why = format!(
            "the configuration has no cloud {name}; name it in [[http.clouds]], and restart the daemon"
        );
        return Err(ApiError::new(Cause::NotFound, why));
    }
    let offered = c.bases.images_of(&name).await?;
    Ok(Json(offered.into_iter().map(CloudImage::from).collect()))
}

impl From<OfferedImage> for CloudImage {
    fn from(image: OfferedImage) -> Self {
        let OfferedImage { id, name, size, disk_format, container_format, url, unusable } = image;
        Self { id, name, size, disk_format, container_format, source: url, unusable }
    }
}
