"""Cleaning of closed triangle meshes: no slivers, no faces without area, no edge of more than two faces.

A sliver is a triangle with an angle below `SLIVER_DEG`. It is removed by collapsing its shortest edge, or, where it is
flat because of one wide angle, by flipping its longest edge. Both keep the mesh closed: an edge is collapsed only if
its ends have exactly two common neighbours (the link condition, Dey et al. 1999), and flipped only if the new edge
does not exist yet; and neither may turn a face over, or move the surface by more than `MAX_MOVE`.
"""

import numpy as np
import trimesh

SLIVER_DEG = 4.0
PASSES = 8
MAX_TURN = 0.5  # least cosine between the normals of a face before and after
MAX_MOVE = 0.1  # of the median edge
APART = 0.02  # of the way from a vertex to the middle of its faces


def remove_slivers(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """Return the mesh with its slivers removed where that keeps its shape; metadata is not kept."""
    surface = _Surface(mesh.vertices, mesh.faces)
    for _ in range(PASSES):
        before = surface.changes
        for face in surface.slivers():
            if surface.faces[face] is not None and surface.worst([surface.faces[face]]) > np.cos(_limit()):
                surface.mend(face)
        if surface.changes == before:
            break
    return surface.mesh()


def drop_flaps(mesh: trimesh.Trimesh) -> None:
    """Remove, in place, faces that name a vertex twice, and pairs of opposite faces with the same three vertices."""
    mesh.update_faces((np.diff(np.sort(mesh.faces, axis=1), axis=1) > 0).all(1))
    ordered = np.sort(mesh.faces, axis=1)
    first = mesh.faces.argmin(1)[:, None]
    ahead, behind = (np.take_along_axis(mesh.faces, (first + step) % 3, axis=1)[:, 0] for step in (1, 2))
    sign = np.where(ahead < behind, 1, -1)  # two faces of the same vertices are opposite if their signs are
    _, which = np.unique(ordered, axis=0, return_inverse=True)
    which = which.reshape(-1)
    left = np.bincount(which, sign)[which].astype(int)  # of each set of three vertices, what the pairs leave over
    keep = np.abs(left) == np.bincount(which)[which]
    for group in np.unique(which[~keep & (left != 0)]):  # three faces or more
        alike = np.flatnonzero((which == group) & (sign * left > 0))
        keep[alike[: abs(left[alike[0]])]] = True
    mesh.update_faces(keep)
    mesh.remove_unreferenced_vertices()


def give_normals(mesh: trimesh.Trimesh) -> None:
    """Give vertices whose faces' normals cancel out, as at the tip of a fin, the normal of one of those faces."""
    lost = np.linalg.norm(mesh.vertex_normals, axis=1) < 0.5
    if lost.any():
        normals = mesh.vertex_normals.copy()
        corners = np.flatnonzero(lost[mesh.faces.reshape(-1)])
        normals[mesh.faces.reshape(-1)[corners]] = mesh.face_normals[corners // 3]
        mesh.vertex_normals = normals


def is_manifold(mesh: trimesh.Trimesh) -> bool:
    """Whether every edge belongs to exactly two faces, and the faces round every vertex are one fan."""
    _, counts = np.unique(np.sort(mesh.edges, axis=1), axis=0, return_counts=True)
    if not (counts == 2).all():
        return False
    return int(_fans(mesh, mesh.face_adjacency, mesh.face_adjacency_edges).max(initial=-1)) + 1 == len(
        np.unique(mesh.faces)
    )


def separate(mesh: trimesh.Trimesh) -> trimesh.Trimesh | None:
    """Cut a closed mesh apart where more than two faces meet in an edge, or several fans in a vertex.

    Of the faces round an edge those are joined that bound the same piece of the inside (Gueziec et al. 2001, "Cutting
    and Stitching"). Every fan gets a vertex of its own, drawn `APART` of the way towards its faces, so that no loader
    joins them again. An edge whose ends a piece shares with another piece in one fan each is split in its middle, which
    adds two faces a piece. Returns a manifold, or None if the mesh is not closed.
    """
    while not is_manifold(mesh):
        edges = np.sort(mesh.edges, axis=1)
        forward = mesh.edges[:, 0] == edges[:, 0]
        unique, which, counts = np.unique(edges, axis=0, return_inverse=True, return_counts=True)
        which = which.reshape(-1)
        if (np.bincount(which, np.where(forward, 1, -1)) != 0).any():
            return None
        groups = np.split(np.argsort(which, kind="stable"), np.cumsum(counts)[:-1])
        parts = [
            [half] if len(half) == 2 else _wedges(mesh, ends, half, forward)
            for half, ends in zip(groups, unique, strict=True)
        ]
        cut = _cut(mesh, parts, unique)
        mesh = cut if cut is not None else _split(mesh, [part for part in parts if len(part) > 1])
    return mesh


def _cut(mesh: trimesh.Trimesh, parts: list, unique: np.ndarray) -> trimesh.Trimesh | None:
    """Give every fan a vertex of its own; None if every vertex has one."""
    pairs = mesh.edges_face[np.array([pair for part in parts for pair in part])]
    fan = _fans(mesh, pairs, np.repeat(unique, [len(part) for part in parts], axis=0))
    source = np.zeros(fan.max() + 1, np.int64)
    source[fan] = mesh.faces
    several = np.bincount(source)[source] > 1
    if not several.any():
        return None
    middle = np.stack([np.bincount(fan.reshape(-1), np.repeat(x, 3)) for x in mesh.triangles_center.T], axis=1)
    middle /= np.bincount(fan.reshape(-1))[:, None]
    points = mesh.vertices[source]
    points[several] += APART * (middle - points)[several]
    return trimesh.Trimesh(points, fan, process=False)


def _split(mesh: trimesh.Trimesh, parts: list) -> trimesh.Trimesh:
    """Split an edge in its middle for each of its pieces; of edges with a common face one, the others later."""
    points, faces, touched = list(mesh.vertices), mesh.faces.tolist(), set()
    for part in parts:
        owners = set(mesh.edges_face[np.array(part)].reshape(-1).tolist())
        if owners & touched:
            continue
        touched |= owners
        for pair in part:
            apexes = []
            for half in pair:
                a, b = mesh.edges[half].tolist()
                face = int(mesh.edges_face[half])
                apex = next(vertex for vertex in mesh.faces[face].tolist() if vertex not in (a, b))
                faces[face] = [a, len(points), apex]
                faces.append([len(points), b, apex])
                apexes.append(mesh.vertices[apex])
            middle = (mesh.vertices[a] + mesh.vertices[b]) / 2
            points.append(middle + APART * (np.mean(apexes, axis=0) - middle))
    return trimesh.Trimesh(np.array(points), np.array(faces), process=False)


def _wedges(mesh: trimesh.Trimesh, edge: np.ndarray, group: np.ndarray, forward: np.ndarray) -> list[list[int]]:
    """Pairs of half-edges of `group` [K], all on `edge` [2], whose faces bound the same piece of the inside."""
    a, b = mesh.vertices[edge]
    axis = (b - a) / max(np.linalg.norm(b - a), 1e-30)
    apex = mesh.triangles_center[mesh.edges_face[group]] - a
    side = np.cross(axis, np.eye(3)[np.abs(axis).argmin()])
    angle = np.arctan2(apex @ np.cross(axis, side), apex @ side)
    turn = group[np.argsort(angle, kind="stable")]
    # turning about the edge, the inside begins at a backward face and ends at a forward one; as brackets are paired
    depth = np.cumsum(np.where(forward[turn], -1, 1))
    turn = np.roll(turn, -(int(depth.argmin()) + 1))
    opened, found = [], []
    for half in turn:
        if forward[half]:
            found.append([opened.pop(), half])
        else:
            opened.append(half)
    return found


def _fans(mesh: trimesh.Trimesh, pairs: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A label [F, 3] for every corner, equal where faces are joined: pairs [K, 2] of faces, at the `ends` [K, 2]."""
    corner, joined = np.arange(3 * len(mesh.faces)).reshape(-1, 3), []
    for end in ends.T:
        # the corners at a vertex are one fan if neighbouring faces are joined at both ends of their common edge
        joined.append(
            np.stack([corner[face, (mesh.faces[face] == end[:, None]).argmax(1)] for face in pairs.T], axis=1)
        )
    labels = trimesh.graph.connected_component_labels(np.concatenate(joined), node_count=corner.size)
    return np.unique(labels, return_inverse=True)[1].reshape(-1, 3)


def _limit() -> float:
    return np.radians(SLIVER_DEG)


class _Surface:
    """A mesh that is edited face by face. A removed face is None."""

    def __init__(self, vertices: np.ndarray, faces: np.ndarray) -> None:
        self.points = np.array(vertices, np.float64)
        self.faces: list[tuple[int, int, int] | None] = [tuple(face) for face in faces.tolist()]
        self.around: list[set[int]] = [set() for _ in self.points]  # the faces of each vertex
        self.changes = 0
        lengths = np.linalg.norm(np.diff(self.points[faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)], axis=1), axis=2)
        self.tolerance = MAX_MOVE * float(np.median(lengths))
        for i, face in enumerate(self.faces):
            for vertex in face:
                self.around[vertex].add(i)

    def mesh(self) -> trimesh.Trimesh:
        faces = np.array([face for face in self.faces if face is not None], np.int64).reshape(-1, 3)
        mesh = trimesh.Trimesh(self.points, faces, process=False)
        mesh.remove_unreferenced_vertices()
        return mesh

    def slivers(self) -> list[int]:
        """The faces with an angle below the limit, the thinnest first."""
        alive = [i for i, face in enumerate(self.faces) if face is not None]
        angle = trimesh.triangles.angles(self.points[np.array([self.faces[i] for i in alive])]).min(1)
        order = np.argsort(angle, kind="stable")
        return [alive[i] for i in order[: int((angle < _limit()).sum())]]

    def mend(self, face: int) -> None:
        """Collapse or flip an edge of a sliver; the first of both that is allowed and makes nothing worse."""
        corners = self.faces[face]
        edges = [(corners[(k + 1) % 3], corners[(k + 2) % 3]) for k in range(3)]  # the edge opposite each corner
        edges.sort(key=lambda edge: np.sum((self.points[edge[0]] - self.points[edge[1]]) ** 2))
        if not self.collapse(*edges[0]) and not self.flip(*edges[2]):
            self.collapse(*edges[1])

    def worst(self, faces: list[tuple[int, int, int]]) -> float:
        """The cosine of the smallest angle of some faces."""
        triangles = self.points[np.array(faces)]
        return float(_cosines(triangles).max())

    def neighbours(self, vertex: int) -> set[int]:
        return {other for face in self.around[vertex] for other in self.faces[face]} - {vertex}

    def collapse(self, a: int, b: int) -> bool:
        """Move b and a into one point: the middle of their edge, or one of both; return whether that was allowed."""
        shared = self.around[a] & self.around[b]
        if len(shared) != 2 or len(self.neighbours(a) & self.neighbours(b)) != 2:
            return False
        kept = [i for i in self.around[a] | self.around[b] if i not in shared]
        if len(kept) < 4:
            return False
        before = [self.faces[i] for i in kept]
        after = [tuple(a if vertex == b else vertex for vertex in face) for face in before]
        worst = max(self.worst(before), self.worst([self.faces[i] for i in shared]))
        normals, ends = _normals(self.points[np.array(before)]), self.points[[a, b]].copy()
        heights = (normals * self.points[np.array(before)[:, 0]]).sum(1)
        for point in (ends.mean(0), ends[0], ends[1]):
            self.points[a] = point
            moved = np.abs(normals @ point - heights).max()
            if moved > self.tolerance or self.worst(after) >= worst:
                continue
            if _agree(normals, _normals(self.points[np.array(after)]), MAX_TURN):
                self._replace(shared, kept, after)
                return True
        self.points[a] = ends[0]
        return False

    def flip(self, a: int, b: int) -> bool:
        """Replace the edge a-b of two faces by that of their other corners; return whether that was allowed."""
        shared = sorted(self.around[a] & self.around[b])
        if len(shared) != 2:
            return False
        before = [self.faces[i] for i in shared]
        c, d = (next(v for v in face if v not in (a, b)) for face in before)
        if c == d or d in self.neighbours(c):
            return False
        first = before[0]
        if first[(first.index(a) + 1) % 3] != b:  # so that the first face runs a, b, c
            a, b = b, a
        after = [(c, a, d), (d, b, c)]
        old, new = (_normals(self.points[np.array(faces)]) for faces in (before, after))
        first_is_thin = self.worst(before[:1]) > self.worst(before[1:])
        normal, apex = (old[1], c) if first_is_thin else (old[0], d)  # of the wider face, and the thin one's corner
        off_plane = abs(normal @ (self.points[apex] - self.points[a]))
        if off_plane > self.tolerance or self.worst(after) >= self.worst(before):
            return False
        if not _agree(np.stack([normal, normal]), new, MAX_TURN):
            return False
        self._replace((), shared, after)
        return True

    def _replace(self, removed, changed: list[int], after: list[tuple[int, int, int]]) -> None:
        for i in (*removed, *changed):
            for vertex in self.faces[i]:
                self.around[vertex].discard(i)
            self.faces[i] = None
        for i, face in zip(changed, after, strict=True):
            self.faces[i] = face
            for vertex in face:
                self.around[vertex].add(i)
        self.changes += 1


def _cosines(triangles: np.ndarray) -> np.ndarray:
    """Cosines of the angles [F, 3] of triangles [F, 3, 3]; 1, as of no angle, at a corner with an edge of length 0."""
    ahead = np.roll(triangles, -1, axis=1) - triangles
    behind = np.roll(triangles, 1, axis=1) - triangles
    length = np.linalg.norm(ahead, axis=2) * np.linalg.norm(behind, axis=2)
    return np.where(length > 0, (ahead * behind).sum(2) / np.where(length > 0, length, 1), 1.0)


def _normals(triangles: np.ndarray) -> np.ndarray:
    cross = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    return cross / np.maximum(np.linalg.norm(cross, axis=1, keepdims=True), 1e-30)


def _agree(before: np.ndarray, after: np.ndarray, least: float) -> bool:
    """Whether no normal turns by more than the angle of cosine `least`; one of zero length before may turn."""
    cosine = (before * after).sum(1)
    return bool(
        (np.linalg.norm(after, axis=1) > 0.5).all() and (cosine[np.linalg.norm(before, axis=1) > 0.5] > least).all()
    )
