//! URLs of images of Glance and of objects of Swift, as an operator writes them.
//!
//! | URL | means |
//! | --- | --- |
//! | `glance://HOST[:PORT][/PREFIX]/ID` | that Glance, by https; credentials as of any URL |
//! | `glance+http://HOST[:PORT][/PREFIX]/ID` | the same by http |
//! | `glance+cloud://CLOUD/ID-OR-NAME` | the Glance of a cloud of `clouds.yaml` |
//! | `swift://CLOUD/CONTAINER/OBJECT` | the Swift of a cloud of `clouds.yaml` |

use reqwest::Url;

use crate::source::http::{climbs, percent_decode};

/// Where the services are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whereabouts {
    /// At this URL, without a slash at its end.
    At(String),
    /// As the catalog of this cloud says.
    Of(String),
}

/// An image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImagePlace {
    /// Its Glance.
    pub glance: Whereabouts,
    /// Its ID, or its name.
    pub image: String,
}

/// An object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectPlace {
    /// The cloud.
    pub cloud: String,
    /// Container and object, as they stand in a URL.
    pub path: String,
}

impl ImagePlace {
    /// Of a URL of a scheme above; none of another scheme.
    ///
    /// # Errors
    /// What is wrong with the URL.
    pub fn parse(text: &str) -> Option<Result<Self, String>> {
        let (scheme, rest) = text.split_once("://")?;
        let scheme = scheme.to_ascii_lowercase();
        Some(match &*scheme {
            "glance" => Self::at("https", rest),
            "glance+http" => Self::at("http", rest),
            "glance+cloud" => Self::of_cloud(rest),
            _ => return None,
        })
    }

    fn at(scheme: &str, rest: &str) -> Result<Self, String> {
        let url = Url::parse(&format!("{scheme}://{rest}")).map_err(|_| "it is not a URL".to_owned())?;
        if !url.username().is_empty() || url.password().is_some() {
            return Err("it has a user; name credentials in [[http.credentials]]".into());
        }
        if url.query().is_some() || url.fragment().is_some() {
            return Err("it has a query or a fragment; give host, port and the ID of the image".into());
        }
        let path = url.path().trim_end_matches('/');
        let Some((prefix, id)) = path.rsplit_once('/').filter(|(_, id)| is_id(id)) else {
            return Err("it does not end with the ID of an image, a UUID; with a name use --cloud".into());
        };
        let prefix = prefix.trim_end_matches("/images").trim_end_matches("/v2").to_owned();
        let id = id.to_ascii_lowercase();
        let mut endpoint = url.clone();
        endpoint.set_path(&prefix);
        let endpoint = endpoint.as_str().trim_end_matches('/').to_owned();
        Ok(Self { glance: Whereabouts::At(endpoint), image: id })
    }

    fn of_cloud(rest: &str) -> Result<Self, String> {
        let (cloud, image) = cloud_and_path(rest)?;
        let image = percent_decode(image);
        if image.is_empty() || image.chars().any(char::is_control) {
            return Err("it names no image; give its ID or its name".into());
        }
        Ok(Self { glance: Whereabouts::Of(cloud.to_owned()), image })
    }

    /// Whether the image is named by its ID.
    pub fn is_by_id(&self) -> bool {
        is_id(&self.image)
    }

    /// The same image by its ID, as a URL that [`parse`](Self::parse) reads.
    pub fn url_of(&self, id: &str) -> String {
        match &self.glance {
            Whereabouts::Of(cloud) => format!("glance+cloud://{cloud}/{id}"),
            Whereabouts::At(endpoint) => match endpoint.strip_prefix("https://") {
                Some(rest) => format!("glance://{rest}/{id}"),
                None => format!("glance+http://{}/{id}", endpoint.trim_start_matches("http://")),
            },
        }
    }
}

impl ObjectPlace {
    /// Of a URL of Swift; none of another scheme.
    ///
    /// # Errors
    /// What is wrong with the URL.
    pub fn parse(text: &str) -> Option<Result<Self, String>> {
        let (scheme, rest) = text.split_once("://")?;
        if !scheme.eq_ignore_ascii_case("swift") {
            return None;
        }
        Some(cloud_and_path(rest).and_then(|(cloud, path)| match path.split_once('/') {
            _ if climbs(path) || path.split('/').any(|part| percent_decode(part) == ".") => {
                Err("it has . or .. between slashes, which could lead out of the container".into())
            }
            // A URL parser would take the one for a slash, and drop the others.
            _ if path.chars().any(|c| c == '\\' || c.is_control()) => {
                Err("it has a backslash or a control character; write a backslash as %5C".into())
            }
            Some((container, object)) if !container.is_empty() && !object.is_empty() => {
                Ok(Self { cloud: cloud.to_owned(), path: path.to_owned() })
            }
            _ => Err("it names no object; give swift://CLOUD/CONTAINER/OBJECT".into()),
        }))
    }
}

fn cloud_and_path(rest: &str) -> Result<(&str, &str), String> {
    let (cloud, path) = rest.split_once('/').unwrap_or((rest, ""));
    let is_name = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if cloud.is_empty() || cloud.len() > 128 || !cloud.chars().all(is_name) {
        return Err(
            "it names no cloud; a cloud's name has letters, digits, dots, dashes and underscores".into()
        );
    }
    if path.contains(['?', '#']) {
        return Err("it has a query or a fragment; write ? as %3F and # as %23".into());
    }
    Ok((cloud, path))
}

/// Whether a text is a UUID with its dashes.
fn is_id(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}
